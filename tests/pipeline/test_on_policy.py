"""On-policy methods as a pipeline: what their stages share, what is refused, and a run of one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands.launch import build
from helpsteer2.config.checked import check
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.errors import ConfigError
from helpsteer2.models.spec import POLICY_FILE, RewardSpec
from helpsteer2.pipeline.contents import Contents
from helpsteer2.pipeline.iterative_dpo import IterativeDPO
from helpsteer2.pipeline.on_policy import OnPolicy
from helpsteer2.pipeline.plan import Commands, PlannedStage, plan
from helpsteer2.pipeline.record import Record
from helpsteer2.pipeline.side_by_side import SideBySide
from helpsteer2.pipeline.stages import Pipeline
from helpsteer2.pipeline.steerlm import SteerLM2
from tests.pipeline.conftest import remember_compositions
from tests.pipeline.processes import (
    Start,
    command,
    finish,
    in_folder,
    kill_with_children,
    made,
    manifest,
    wait_for,
)

PPO: dict[str, Any] = {"choose": {"module": "ppo"}}
RLOO: dict[str, Any] = {"choose": {"module": "reinforce"}}
GIVEN: dict[str, Any] = {
    "policy": "some/policy",
    "reward_model": "some/model",
    "methods": {"ppo": PPO},
    "prompts": {"choose": {"data": "world"}, "data": {"groups": 300}},
}
TRAINED: dict[str, Any] = {
    **GIVEN,
    "policy": None,
    "sft": {"choose": {"module": "sft"}},
    "reward_model": None,
    "reward": {"backbone": {"path": "@sft/export"}, "choose": {"backbone": "local"}},
}


@pytest.fixture(scope="module", autouse=True)
def compositions() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        remember_compositions(patch)
        yield


def planned(pipeline: Pipeline) -> dict[str, PlannedStage]:
    """The stages of a recipe, as if they were to lie beside the tests: nothing is written."""
    commands, folder = (
        Commands(CONFIG_COMMANDS, ("-m", "helpsteer2")),
        Path("no/such/stages").absolute(),
    )
    stages = plan(pipeline.stages(7), commands, folder, Contents(folder / "memory"))
    assert not folder.exists()
    return {stage.name: stage for stage in stages}


def mistakes(pipeline: Pipeline) -> str:
    """What planning says of a recipe that cannot work."""
    with pytest.raises(ConfigError) as caught:
        planned(pipeline)
    return str(caught.value)


def reads(stages: Mapping[str, PlannedStage]) -> dict[str, set[str]]:
    """The outputs that each stage reads."""
    return {
        name: {f"{earlier.name}/{path}" for earlier, path in stage.reads}
        for name, stage in stages.items()
    }


def of_data(stage: PlannedStage) -> dict[str, Any]:
    return {key: value for key, value in stage.depends_on.items() if key.startswith("data.")}


def reward_model(folder: Path, *names: str) -> str:
    """A reward model's folder as far as planning looks at it."""
    folder.mkdir()
    limits = LengthLimits(100, 100)
    RewardSpec(names, "chatml", "…", "hash", None, limits, "hash", "base").write(folder)
    return str(folder)


def policy(folder: Path) -> str:
    folder.mkdir()
    (folder / POLICY_FILE).write_text("{}")
    return str(folder)


def test_methods_differ_in_nothing_but_what_they_are() -> None:
    # Each tries to bring what would make the comparison unfair.
    unfair = {
        "seed": 3,
        "lengths": {"max_prompt_tokens": 9},
        "trainer": {"precision": "bf16-mixed"},
    }
    methods = {"ppo": PPO, "rloo": {**RLOO, **unfair}}
    stages = planned(
        OnPolicy(**TRAINED | {"methods": methods}, max_prompt_tokens=111, weights="uniform")
    )
    assert list(stages) == ["sft", "reward_model", "statistics", "ppo", "rloo"]
    ppo, rloo = stages["ppo"].depends_on, stages["rloo"].depends_on
    assert str(ppo["module._target_"]).endswith(".PPOModule")
    assert str(rloo["module._target_"]).endswith(".ReinforceModule")
    shared = {key for key in ppo.keys() & rloo.keys() if not key.startswith("module.")}
    differing = {key for key in shared if ppo[key] != rloo[key]}
    assert differing == {"rollouts.epochs"}  # REINFORCE takes one pass
    assert (ppo["seed"], ppo["lengths.max_prompt_tokens"]) == (7, 111)
    assert ppo["trainer.precision"] == "32-true"
    assert ppo["weights.name"] == "uniform"
    for method in ("ppo", "rloo"):
        start = {"sft/export", "reward_model/export", "statistics/statistics.json"}
        assert reads(stages)[method] == start


def test_rewards_are_measured_over_the_data_of_the_prompts() -> None:
    def statistics(**settings: Any) -> tuple[PlannedStage, PlannedStage]:
        stages = planned(OnPolicy(**GIVEN, **settings))
        return stages["statistics"], stages["ppo"]

    measured, trained = statistics()
    assert of_data(measured) == of_data(trained)
    assert measured.depends_on["split"] == "train"
    fewer, trained = statistics(statistics={"data": {"groups": 100}})
    assert (fewer.depends_on["data.groups"], trained.depends_on["data.groups"]) == (100, 300)
    other, trained = statistics(statistics={"choose": {"data": "helpsteer2"}})
    assert "data.groups" not in of_data(other)
    assert of_data(trained)["data.groups"] == 300


def test_a_method_may_have_a_reward_of_its_own() -> None:
    own = {"weights": "helpfulness_only", "module": "ppo"}
    methods = {"ppo": PPO, "own": {"choose": own, "rollouts": {"statistics": None}}}
    stages = planned(OnPolicy(**GIVEN | {"methods": methods}))
    assert stages["own"].depends_on["weights.name"] == "helpfulness_only"
    assert reads(stages)["own"] == set()
    assert stages["ppo"].depends_on["weights.name"] == "helpsteer2_rlhf"


def test_another_weighting_trains_no_reward_model_again() -> None:
    one, other = (
        planned(OnPolicy(**TRAINED, weights=weights)) for weights in ("helpsteer2_rlhf", "uniform")
    )
    shared = {name for name in one if one[name].folder == other[name].folder}
    assert shared == {"sft", "reward_model", "statistics"}


def test_each_policy_is_chosen_and_evaluated() -> None:
    exports = {"schedule": {"export_every": 5}}
    methods = {"ppo": {**PPO, **exports}, "rloo": {**RLOO, **exports}}
    asked: dict[str, Any] = {"select": {"metric": "ratings/x"}, "evaluate": {}}
    stages = planned(OnPolicy(**GIVEN | {"methods": methods}, **asked))
    for method in ("ppo", "rloo"):
        assert reads(stages)[f"select_{method}"] == {f"{method}/exports"}
        assert reads(stages)[f"evaluate_{method}"] == {f"select_{method}/export"}
    assert stages["evaluate_sft"].depends_on["model"] == "some/policy"
    text = mistakes(OnPolicy(**GIVEN, **asked))
    assert "stage select_ppo: reads the exports of stage ppo, which keeps none" in text
    assert "+pipeline.methods.NAME.schedule.export_every=STEPS" in text


def test_a_recipe_needs_methods_that_say_what_they_are() -> None:
    without_ppo = OnPolicy(**GIVEN | {"methods": {"ppo": None, "rloo": RLOO}})
    assert list(planned(without_ppo)) == ["statistics", "rloo"]
    for methods in ({}, {"ppo": None}):
        with pytest.raises(ConfigError, match=r"pipeline\.methods: there is none"):
            OnPolicy(**GIVEN | {"methods": methods})
    with pytest.raises(ConfigError, match=r"methods\.mine: does not say .*choose\.module=ppo"):
        OnPolicy(**GIVEN | {"methods": {"mine": {"module": {"gradient_clip": 1.0}}}})
    with pytest.raises(ConfigError, match=r"pipeline\.methods\.a/b: a stage is named"):
        OnPolicy(**GIVEN | {"methods": {"a/b": PPO}})
    with pytest.raises(ConfigError, match="two stages are named 'statistics'"):
        planned(OnPolicy(**GIVEN | {"methods": {"statistics": PPO}}))
    with pytest.raises(ConfigError, match=r"pipeline\.reward_model: give either"):
        OnPolicy(**GIVEN | {"reward": {}})


def test_a_reward_model_without_the_weighted_attributes_is_told_at_once(tmp_path: Path) -> None:
    reward = {"choose": {"weights": "helpfulness_only"}, "attributes": ["helpfulness", "clarity"]}
    recipe = TRAINED | {"reward": reward}
    text = mistakes(OnPolicy(**recipe))
    assert text.startswith("stage ppo: weights 'helpsteer2_rlhf' need correctness, coherence")
    assert "the model is that of stage reward_model" in text
    assert planned(OnPolicy(**recipe, weights="helpfulness_only"))
    given = reward_model(tmp_path / "given", "helpfulness", "verbosity")
    assert given in mistakes(OnPolicy(**GIVEN | {"reward_model": given}))
    # One score is the reward, whatever its name.
    single = reward_model(tmp_path / "single", "preference")
    assert planned(OnPolicy(**GIVEN | {"reward_model": single}))


def test_the_reward_model_may_be_behind_a_server() -> None:
    server = "http://127.0.0.1:8000"
    ppo = {"choose": {**PPO["choose"], "scorer@rollouts.rewarder": "http"}}
    statistics = {"choose": {"rewarder": "http"}, "rewarder": {"url": server}}
    asked = {"reward_model": server, "methods": {"ppo": ppo}}
    stages = planned(OnPolicy(**GIVEN | asked, statistics=statistics))
    assert stages["ppo"].depends_on["rollouts.rewarder.url"] == server


def test_a_model_of_the_wrong_kind_is_told_at_once(tmp_path: Path) -> None:
    sft, rewarding = policy(tmp_path / "sft"), reward_model(tmp_path / "rewarding", "preference")
    text = mistakes(OnPolicy(**GIVEN | {"reward_model": sft, "policy": rewarding}))
    assert f"{sft} is a policy" in text
    assert f"{rewarding} is a reward model" in text
    text = mistakes(OnPolicy(**GIVEN | {"policy": "outputs/no/such/folder"}))
    assert text == "stage ppo: outputs/no/such/folder: no such folder"
    text = mistakes(OnPolicy(**TRAINED | {"sft": {}, "reward": {"choose": {"module": "sft"}}}))
    assert "stage statistics: needs a reward model, but stage reward_model trains a pol" in text
    assert "stage ppo: needs a policy, but stage sft trains a reward model" in text


@pytest.mark.parametrize(
    ("settings", "right", "wrong"),
    [
        (lambda model: {"module": {"critic": {"init_from": model}}}, "reward_model", "sft"),
        (lambda model: {"rollouts": {"watch": {"it": {"path": model}}}}, "reward_model", "sft"),
        (lambda model: {"rollouts": {"reference": model}}, "sft", "reward_model"),
    ],
    ids=["critic", "watch", "reference"],
)
def test_whatever_a_method_reads_is_of_the_right_kind(
    settings: Callable[[str], dict[str, Any]], right: str, wrong: str
) -> None:
    def reading(stage: str) -> OnPolicy:
        read = settings(f"@{stage}/export")
        watch = {"+scorer@rollouts.watch.it": "local"} if "watch" in str(read) else {}
        ppo = {**read, "choose": {**PPO["choose"], **watch}}
        return OnPolicy(**TRAINED | {"methods": {"ppo": ppo}})

    assert planned(reading(right))
    assert f"but stage {wrong} trains a " in mistakes(reading(wrong))


def test_where_a_given_model_lies_changes_no_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        reward_model(tmp_path / name, "preference")
    reward_model(tmp_path / "other", "quality")
    one, two, other = (
        planned(OnPolicy(**GIVEN | {"reward_model": name}))["ppo"].fingerprint
        for name in ("one", "two", "other")
    )
    assert one == two != other


def test_recipes_side_by_side_share_their_stages_with_each_alone() -> None:
    iterative = {key: TRAINED[key] for key in ("policy", "sft", "reward_model", "reward")}
    shared = dict(iterative)
    iterative |= {"iterations": 1, "pairs": {"choose": {"data": "world"}}}
    world = {"choose": {"data": "world"}}
    steered = {"annotate_sft": world, "label_prompts": world, "steerlm2_iterations": 1}
    together = planned(SideBySide(**TRAINED | iterative | steered))
    alone = [
        planned(IterativeDPO(**iterative)),
        planned(OnPolicy(**TRAINED)),
        planned(SteerLM2(**shared | steered)),
    ]
    folders = {stage.folder for stages in alone for stage in stages.values()}
    assert {stage.folder for stage in together.values()} == folders
    names = ["dpo_1", "statistics", "ppo", "steerlm", "steerlm2_1"]
    assert [name for name in together if name in names] == names


def test_the_quickstart_trains_every_method_from_one_start() -> None:
    (job,) = check(CONFIG_COMMANDS["pipeline"], ["experiment=pipeline/quickstart"]).jobs
    stages = planned(build({"it": job.given("pipeline")})["it"])
    names = ["dpo", "dpo_1", "dpo_2", "ppo", "rloo", "steerlm", "steerlm2_1", "steerlm2_2"]
    assert [name for name in stages if name in names] == names
    read = reads(stages)
    assert read["reward_model"] == {"sft/export"} <= read["dpo"]
    assert read["statistics"] == {"reward_model/export"} <= read["annotate_1"]
    assert read["steerlm"] == {"sft/export", "label/train.jsonl"}
    assert read["prior_2"] == {"sft/export", "steered_2/groups.jsonl"}
    assert read["proposal_2"] == {"steerlm2_1/export", "steered_2/groups.jsonl"}
    for name in ("ppo", "rloo"):
        # The world's experiment of that name, but for how much of it.
        start = {"sft/export", "reward_model/export", "statistics/statistics.json"}
        assert read[name] == start
        whole = check(CONFIG_COMMANDS["train"], [
            f"experiment=on_policy/world_{name}", "backbone.path=a/b", "reward_model=a/c",
            "rollouts.statistics=d",
        ]).jobs[0]  # fmt: skip
        ours = stages[name].settings
        for key in ("rollouts.sampling", "rollouts.watch", "trainer", "weights"):
            assert ours[key] == whole[key], key
        assert {**ours["module"], "critic": None} == {**whole["module"], "critic": None}
        assert ours["batching.max_steps"] <= whole["batching.max_steps"]


def test_checking_it_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; from helpsteer2.__main__ import main; code = main(); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(code)"
    )
    arguments = [
        "check", "pipeline", "pipeline=on_policy", "pipeline.policy=some/policy",
        "pipeline.reward_model=some/model", "+pipeline.methods.ppo.choose.module=ppo",
    ]  # fmt: skip
    shown = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "statistics, ppo" in shown.stdout


RECIPE = """
defaults:
  - on_policy
methods:
  ppo:
    choose: {module: ppo, trainer: cpu}
    rollouts: {prompts: 8, epochs: 2, sampling: {n: 1, max_tokens: 8}}
    batching: {global_batch: 4, max_steps: 24}
    schedule: {checkpoint_every: 2}
  rloo:
    choose: {module: reinforce, trainer: cpu}
    rollouts: {prompts: 8, sampling: {n: 2, max_tokens: 8}}
    batching: {global_batch: 4, max_steps: 4}
prompts:
  choose: {data: world}
  data: {groups: 32}
max_prompt_tokens: 256
max_response_tokens: 256
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute of processor time, many more where cores are busy
def test_killed_while_it_samples_and_learns_it_makes_the_same(
    models: Path, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "short.yaml").write_text(RECIPE)
    pipeline = command(
        "pipeline", f"--config-dir={tmp_path / 'conf'}", "pipeline=short",
        f"pipeline.policy={models / 'sft' / 'export'}",
        f"pipeline.reward_model={models / 'regression' / 'export'}",
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start([*pipeline, *in_folder(whole)])  # meanwhile, on another core
    process = start([*pipeline, *in_folder(killed)])
    stages = killed / "stages"
    wait_for(lambda: any(stages.glob("ppo-*/checkpoints/last.ckpt")), process, 500)
    kill_with_children(process)
    (folder,) = stages.glob("ppo-*")
    record = Record.of(folder)
    assert record is not None
    assert record.state == "running"
    assert "statistics: done before" in finish(start([*pipeline, *in_folder(killed)]))
    finish(undisturbed)
    assert made(killed) == made(whole)
    entries = {entry["name"]: entry for entry in manifest(whole)}
    assert list(entries) == ["statistics", "ppo", "rloo"]
    for method in ("ppo", "rloo"):
        # What it measured its rewards by is what the stage before has made.
        (digest,) = entries[method]["inputs"].values()
        assert digest == Record.of(Path(entries["statistics"]["folder"])).digest("statistics.json")  # type: ignore[union-attr]
        assert "export/model.safetensors" in entries[method]["outputs"]
