"""On-policy training: settings that cannot work together, and models that are of no use there.

Of a model in a local folder the small files are read, and no weights. What they do not tell (a Hub
id, a server, a model of another project) is left to the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer2.config.modules import NotFound, resolve
from helpsteer2.config.signatures import lineage

if TYPE_CHECKING:
    from helpsteer2.config.rules import Finding, Settings

ON_POLICY = "helpsteer2.modules.on_policy.OnPolicyModule"
ANY_MODULE = "helpsteer2.modules.step.StepModule"

REWARD_FILE, POLICY_FILE, TOKENIZER_FILE = "reward_model.json", "policy.json", "tokenizer.json"
"""What tells the kind of an export, as in ``helpsteer2.models.spec``, and its vocabulary."""

LOCAL_SCORER = "helpsteer2.rewards.scorer.RewardScorer.from_pretrained"
REMOTE_SCORER = "helpsteer2.rewards.client.RewardClient"


def _samples(settings: Settings) -> bool | None:
    """Whether the module samples what it learns from; None where source alone cannot tell."""
    module = settings["module._target_"]
    if not isinstance(module, str):
        return None
    try:
        definition = resolve(module)
    except NotFound:
        return None  # told where the node itself is checked
    if definition is None:
        return None
    family = {parent.full_name for parent in lineage(definition) if parent is not None}
    if ON_POLICY in family:
        return True
    return False if ANY_MODULE in family else None


def _module(settings: Settings) -> str:
    return str(settings["module._target_"]).rpartition(".")[2]


def rollouts_go_with_the_module(settings: Settings) -> Iterator[Finding]:
    """Who learns from samples says how they are made; nobody else does."""
    samples = _samples(settings)
    if samples and settings.given("rollouts") is None:
        yield (
            "rollouts",
            f"is not given, but {_module(settings)} learns from what the policy samples: leave it "
            "to module=ppo or module=reinforce",
        )
    for key in ("rollouts", "reward_model"):
        if samples is False and settings.given(key) is not None:
            yield (
                key,
                f"{_module(settings)} samples nothing that could be scored: leave it out, or "
                "choose module=ppo or module=reinforce",
            )


def samples_are_not_validated(settings: Settings) -> Iterator[Finding]:
    """There are no groups that a loss on new samples could be computed of."""
    if not _samples(settings):
        return
    if settings["schedule.validate_every"] is not None:
        yield (
            "schedule.validate_every",
            f"has to be null: {_module(settings)} learns from new samples all the time; "
            "schedule.export_every and helpsteer2 select choose among its policies",
        )
    metric = settings["optimized_metric"]
    if isinstance(metric, str) and metric.startswith("val/"):
        yield (
            "optimized_metric",
            f"{metric} comes from a validation, and there is none: take rollout/reward, another "
            "figure of the rollouts, or null",
        )


def iterations_are_whole_steps(settings: Settings) -> Iterator[Finding]:
    """No step learns from two iterations."""
    prompts = settings.number("rollouts.prompts")
    global_batch = settings.number("batching.global_batch")
    if prompts is None or global_batch is None or global_batch < 1:
        return
    if prompts % global_batch:
        yield (
            "rollouts.prompts",
            f"{prompts} prompts are no whole number of steps of batching.global_batch="
            f"{global_batch}: choose a multiple",
        )


def advantages_can_be_computed(settings: Settings) -> Iterator[Finding]:
    """A baseline needs the responses it is the mean of, and values need a critic."""
    kind, path = str(settings["module.advantages._target_"]), "module.advantages"
    if kind.endswith(".GAE") and _module(settings) == "ReinforceModule":
        yield path, "GAE needs a critic, which ReinforceModule has not: choose module=ppo"
    if not kind.endswith(".AgainstBaseline"):
        return
    baseline = settings[f"{path}.baseline"]
    if settings[f"{path}.normalise"] and baseline not in (None, "leave_one_out"):
        yield (
            f"{path}.normalise",
            f"compares the responses to one prompt, which baseline={baseline} does not: set "
            f"{path}.baseline=leave_one_out",
        )
    elif baseline == "leave_one_out" and settings.number("rollouts.sampling.n") == 1:
        yield (
            "rollouts.sampling.n",
            "1 response has no other one of its prompt to be compared with, so nothing would be "
            f"learned: sample 2 or more, or set {path}.baseline=batch_mean",
        )


def penalty_pulls(settings: Settings) -> Iterator[Finding]:
    """A KL penalty has to have a gradient, and a coefficient that can change."""
    kl = "module.kl"
    if settings[f"{kl}.place"] == "loss" and settings[f"{kl}.estimator"] == "k1":
        yield (
            f"{kl}.estimator",
            f"k1 in the loss has a gradient of 0 in expectation: take {kl}.estimator=k2 (or k3), "
            f"or {kl}.place=reward",
        )
    is_adaptive = settings[f"{kl}.target"] is not None
    if is_adaptive and settings.number(f"{kl}.coefficient") == 0:
        yield (
            f"{kl}.target",
            f"adapts {kl}.coefficient by a factor, and 0 stays 0: begin with one above 0",
        )


def policy_samples_in_this_process(settings: Settings) -> Iterator[Finding]:
    """The weights change with every step, and nothing gives them to a server."""
    if str(settings.given("rollouts.engine._target_")).endswith(".OpenAIEngine"):
        yield (
            "rollouts.engine",
            "a server cannot be given the weights that train before every iteration: leave "
            "engine@rollouts.engine out, the policy then samples in this process",
        )


def nothing_is_set_in_vain(settings: Settings) -> Iterator[Finding]:
    """A setting that another one keeps from having any effect."""
    if settings["rollouts"] is None:
        return
    penalises = settings["rollouts.unfinished"] in (None, "penalise")
    is_copy = settings["module.critic.init_from"] is None
    for path, has_no_effect, told in (
        ("rollouts.sampling.seed", True, "every iteration has one of its own: use seed"),
        ("rollouts.engine.device", True, "samples are made where the policy trains: leave it out"),
        ("rollouts.penalty", not penalises, "needs rollouts.unfinished=penalise"),
        (
            "rollouts.beyond_max_kl",
            settings.given("rollouts.max_kl") is None,
            "needs rollouts.max_kl=NATS, beyond which it says what happens",
        ),
        (
            "module.kl.horizon",
            settings.given("module.kl.target") is None,
            "needs module.kl.target=NATS, towards which the coefficient is adapted",
        ),
        (
            "module.critic.lora",
            is_copy,
            "a critic that is a copy of the policy has the policy's adapters (lora=default); these "
            "are for module.critic.init_from=DIR",
        ),
    ):
        if has_no_effect and settings.given(path) is not None:
            yield path, told


def steps_begin_where_samples_came_from(settings: Settings) -> Iterator[Finding]:
    """With dropout the policy that learns is not the one that was sampled and measured."""
    dropout = settings.number("backbone.lora.dropout")
    if _samples(settings) and dropout:
        yield (
            "backbone.lora.dropout",
            f"has to be 0 for {_module(settings)}, got {dropout}: a policy under dropout is not "
            "the one that sampled what it learns from",
        )


def _scorers(settings: Settings) -> Iterator[tuple[str, str]]:
    """Every node that opens a reward model for rollouts: its dotted path, and what it opens."""
    for path, target in settings.nodes():
        if path == "rollouts.rewarder" or path.startswith("rollouts.watch."):
            yield path, target


def _told_at(settings: Settings, path: str) -> str:
    """Where the value of a key was given: ``reward_model`` is what other keys take theirs from."""
    return "reward_model" if settings[path] == settings["reward_model"] else path


def _is_address(value: str) -> bool:
    return value.startswith(("http://", "https://"))


def scorers_are_where_they_are_looked_for(settings: Settings) -> Iterator[Finding]:
    """A folder is opened in this process, an address by a client."""
    for path, target in _scorers(settings):
        key = {LOCAL_SCORER: f"{path}.path", REMOTE_SCORER: f"{path}.url"}.get(target)
        value = None if key is None else settings[key]
        if key is None or not isinstance(value, str):
            continue
        if _is_address(value) and target == LOCAL_SCORER:
            yield _told_at(settings, key), f"is a server: choose scorer@{path}=http"
        elif not _is_address(value) and target == REMOTE_SCORER:
            yield (
                _told_at(settings, key),
                f"expected http://HOST:PORT, got {value}; scorer@{path}=local opens a folder",
            )


def weights_are_in_folders(settings: Settings) -> Iterator[Finding]:
    """A server gives scores, but no weights to go on from."""
    for path, instead in (
        ("module.critic.init_from", "the critic is then a copy of the policy"),
        ("rollouts.reference", "the reference is then the policy that training starts from"),
    ):
        value = settings[path]
        if isinstance(value, str) and _is_address(value):
            yield (
                path,
                f"{value} is a server, which hands out no weights: give the folder of the model, "
                f"or null ({instead})",
            )


def _local_scorers(settings: Settings) -> Iterator[tuple[str, Path]]:
    """Reward models in local folders: the key that names each, and the folder."""
    for path, target in _scorers(settings):
        folder = _folder(settings[f"{path}.path"]) if target == LOCAL_SCORER else None
        if folder is not None:
            yield f"{path}.path", folder


def models_are_of_the_right_kind(settings: Settings) -> Iterator[Finding]:
    """A policy gives no scores, and a reward model samples nothing."""
    if settings["rollouts"] is None:
        return
    scoring = dict(_local_scorers(settings))
    critic = _folder(settings["module.critic.init_from"])
    if critic is not None:
        scoring["module.critic.init_from"] = critic
    found: dict[str, str] = {}
    for key, folder in scoring.items():
        if (folder / POLICY_FILE).is_file():
            found[_told_at(settings, key)] = f"{folder} is a policy: a reward model is needed"
    for key in ("backbone.path", "rollouts.reference"):
        sampling = _folder(settings[key])
        if sampling is not None and (sampling / REWARD_FILE).is_file():
            found[key] = f"{sampling} is a reward model: a policy is needed"
    yield from found.items()


def scores_are_weighted(settings: Settings) -> Iterator[Finding]:
    """A weighting of a score that the reward model does not give can never be applied."""
    told: dict[str, str] = {}
    for _, folder in _local_scorers(settings):
        names = _record(folder, REWARD_FILE).get("attribute_names")
        if not isinstance(names, list) or len(names) < 2:
            continue  # a single score is the reward, whatever its name
        scores, values = f"{folder} scores {', '.join(map(str, names))}", settings["weights.values"]
        if settings.given("weights") is None:
            told.setdefault("weights", f"is null, but {scores}: choose one to make one reward")
        elif isinstance(values, Mapping):
            lacking = [str(name) for name, value in values.items() if value and name not in names]
            if lacking:
                told.setdefault("weights.values", f"names {', '.join(lacking)}, but {scores}")
    yield from told.items()


def critic_reads_the_ids_of_the_policy(settings: Settings) -> Iterator[Finding]:
    """A critic gets token ids, unlike a reward model, which gets text."""
    policy, critic = (
        _folder(settings[key]) for key in ("backbone.tokenizer.path", "module.critic.init_from")
    )
    if policy is None or critic is None:
        return
    hashes = [
        _record(policy, POLICY_FILE).get("tokenizer_hash"),
        _record(critic, REWARD_FILE).get("tokenizer_hash"),
    ]
    if None in hashes or hashes[0] == hashes[1]:
        return
    # The hash is also of the template and the special tokens, which may differ.
    vocabularies = [vocabulary(policy), vocabulary(critic)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        yield (
            "module.critic.init_from",
            f"{critic} has another vocabulary than the policy, whose ids the critic reads: set it "
            "to null (this model may still score: that goes by text)",
        )


def vocabulary(folder: Path) -> dict[str, int] | None:
    """The id of every token, as the tokenizer of an export has it.

    Args:
        folder: With the file of a fast tokenizer.

    Returns:
        None if there is no such file, or it is of a kind unknown here.
    """
    record = _record(folder, TOKENIZER_FILE)
    try:
        vocab = record["model"]["vocab"]
        if isinstance(vocab, list):  # pieces with their scores, in the order of their ids
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        return {**vocab, **{token["content"]: token["id"] for token in record["added_tokens"]}}
    except (KeyError, TypeError, ValueError):
        return None


def _folder(path: object) -> Path | None:
    """The local folder that a path means; None if there is none."""
    if not isinstance(path, str) or not path:
        return None
    folder = Path(path).expanduser()
    return folder if folder.is_dir() else None


def _record(folder: Path, name: str) -> Mapping[str, Any]:
    """The content of a small JSON file; nothing if it cannot be read, which the run tells of."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, Mapping) else {}


ON_POLICY_RULES = (
    rollouts_go_with_the_module,
    samples_are_not_validated,
    iterations_are_whole_steps,
    advantages_can_be_computed,
    penalty_pulls,
    policy_samples_in_this_process,
    nothing_is_set_in_vain,
    steps_begin_where_samples_came_from,
    scorers_are_where_they_are_looked_for,
    weights_are_in_folders,
    models_are_of_the_right_kind,
    scores_are_weighted,
    critic_reads_the_ids_of_the_policy,
)
"""Every rule, in the order in which findings are shown."""
