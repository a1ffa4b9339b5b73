"""Whether the models that stages read will be there and fit, found out before the first stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer2.attributes import AttributeWeights
from helpsteer2.errors import UserError
from helpsteer2.evaluation.meaning import ScoreMeaning
from helpsteer2.evaluation.scoring import usable_weightings
from helpsteer2.models.spec import POLICY_FILE, SPEC_FILE, RewardSpec
from helpsteer2.pipeline.fingerprint import STAGE
from helpsteer2.pipeline.stages import Output

if TYPE_CHECKING:
    from helpsteer2.pipeline.plan import PlannedStage

PREFERENCE_MODULE = ".PreferenceModule"
"""Whose reward model has a score without a unit."""


def model_mistakes(stages: Mapping[str, PlannedStage]) -> list[str]:
    """Find models that a stage could not use.

    Of a model in a folder the small files are read, of one that a stage trains the configuration.
    What neither tells (a Hub id, a server, a model of another project) is left to the stage.

    Args:
        stages: The plan, by name.

    Returns:
        Each mistake, with the first stage that would find it.
    """
    checks = {
        "reference": _reads_policy,
        "sample": _reads_policy,
        "weigh": _reads_policy,
        "annotate": _reads_rewards,
        "label": _labels_scores,
        "pairs": _weights_scores,
        "train": _samples_and_scores,
    }
    found: dict[str, str] = {}
    for name, stage in stages.items():
        for check in (_reads_exports, checks.get(stage.stage.command)):
            try:
                if check is not None:
                    check(stage, stages)
            except UserError as error:
                found.setdefault(str(error), name)
    return [f"stage {name}: {message}" for message, name in found.items()]


def _reads_exports(stage: PlannedStage, stages: Mapping[str, PlannedStage]) -> None:
    """A training keeps the models of steps on the way only if it is told to."""
    for output in stage.stage.reads():
        made_by = stages[output.stage]
        is_told = made_by.settings["schedule.export_every"] is not None
        is_export = output.path.partition("/")[0] == "exports"
        if is_export and made_by.stage.command == "train" and not is_told:
            raise UserError(
                f"reads the exports of stage {output.stage}, which keeps none: set its "
                "schedule.export_every, for dpo +pipeline.train.schedule.export_every=STEPS, for "
                "a method +pipeline.methods.NAME.schedule.export_every=STEPS"
            )


def _reads_policy(stage: PlannedStage, stages: Mapping[str, PlannedStage]) -> None:
    _require_policy(_model(stage, "model", stages), stages)


def _reads_rewards(stage: PlannedStage, stages: Mapping[str, PlannedStage]) -> None:
    names = _score_names(_model(stage, "rewarder.path", stages), stages)
    if names is not None:
        weightings = stage.settings["weightings"] or {}
        usable_weightings(map(_weighting, weightings.values()), tuple(names))


def _weights_scores(stage: PlannedStage, stages: Mapping[str, PlannedStage]) -> None:
    """The weighting that makes pairs has to fit what the reward model scores."""
    groups = stage.stage.overrides.get("data.path")
    if stage.settings["by"] != "scores" or not isinstance(groups, Output):
        return
    scored = stages[groups.stage]
    _require_weighted(_model(scored, "rewarder.path", stages), stage, stages)


def _labels_scores(stage: PlannedStage, stages: Mapping[str, PlannedStage]) -> None:
    """Labels are ratings, so the reward model has to predict those that are asked for."""
    groups = stage.stage.overrides.get("data.path")
    if stage.settings["by"] != "scores" or not isinstance(groups, Output):
        return
    model = _model(stages[groups.stage], "rewarder.path", stages)
    names = _score_names(model, stages)
    told = f"stage {model.stage}" if isinstance(model, Output) else model
    lacking = [name for name in stage.settings["names"] or () if names and name not in names]
    if lacking:
        raise UserError(
            f"labels of {', '.join(lacking)} need a reward model that scores them; that of {told} "
            f"scores {', '.join(names or ())}"
        )
    if not _predicts_ratings(model, stages):
        raise UserError(
            f"labels are ratings 0–4, which the reward model of {told} does not predict: it was "
            "learned from preferences, or extrapolated; take one of module=regression"
        )


def _samples_and_scores(stage: PlannedStage, stages: Mapping[str, PlannedStage]) -> None:
    """A training on samples of its own needs policies here and reward models there."""
    if stage.settings["rollouts"] is None:
        return
    for key in ("backbone.path", "rollouts.reference"):
        _require_policy(_model(stage, key, stages), stages)
    _require_kind("reward model", _model(stage, "module.critic.init_from", stages), stages)
    watched = (f"watch.{name}" for name in stage.settings["rollouts.watch"] or {})
    for scorer in ("rewarder", *watched):
        _require_weighted(_model(stage, f"rollouts.{scorer}.path", stages), stage, stages)


def _model(
    stage: PlannedStage, key: str, stages: Mapping[str, PlannedStage]
) -> Output | str | None:
    """The model that a key names: of a stage, also where it stands for another key, or given."""
    value = stage.settings[key]
    if not isinstance(value, str) or not value.startswith(STAGE):
        return value if isinstance(value, str) else None
    folder, _, path = value.removeprefix(STAGE).partition("/")
    (name,) = (name for name, other in stages.items() if other.folder.name == folder)
    return Output(name, path)


def _require_policy(model: Output | str | None, stages: Mapping[str, PlannedStage]) -> None:
    """Refuse what is known to be no policy that could answer."""
    _require_kind("policy", model, stages)
    folder = _folder(model)
    if folder is None or (folder / POLICY_FILE).is_file():
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{model} is no policy: it has no config.json and no {POLICY_FILE}")
    if not _has_chat_template(folder):
        raise UserError(
            f"{model} has no chat template, so nobody could say where an answer begins and ends: "
            "train it first (module=sft), or put a chat_template.jinja there"
        )


def _require_weighted(
    model: Output | str | None, stage: PlannedStage, stages: Mapping[str, PlannedStage]
) -> None:
    """Refuse a reward model whose scores a stage's weighting cannot make one reward of."""
    names = _score_names(model, stages)
    # A single score is the reward, whatever its name.
    if names is None or len(names) == 1:
        return
    try:
        _weighting(stage.settings["weights"]).vector(names)
    except UserError as error:
        told = f"stage {model.stage}" if isinstance(model, Output) else model
        raise UserError(f"{error} (pipeline.weights=…); the model is that of {told}") from error


def _score_names(
    model: Output | str | None, stages: Mapping[str, PlannedStage]
) -> Sequence[str] | None:
    """Names of the scores of a reward model; None if they are not known.

    Raises:
        UserError: If it is known to be none.
    """
    _require_kind("reward model", model, stages)
    if isinstance(model, Output):
        names: list[str] | None = stages[model.stage].settings["attributes"]
        return names
    folder = _folder(model)
    spec = None if folder is None else RewardSpec.read(folder)
    return None if spec is None else spec.attribute_names


def _predicts_ratings(model: Output | str | None, stages: Mapping[str, PlannedStage]) -> bool:
    """Whether the scores of a reward model are ratings, as far as it can be known."""
    if isinstance(model, Output):
        return not str(stages[model.stage].settings["module._target_"]).endswith(PREFERENCE_MODULE)
    folder = _folder(model)
    spec = None if folder is None else RewardSpec.read(folder)
    return spec is None or ScoreMeaning.of(spec).are_ratings


def _weighting(node: Mapping[str, Any]) -> AttributeWeights:
    return AttributeWeights(node["name"], node["values"])


def _require_kind(
    wanted: str, model: Output | str | None, stages: Mapping[str, PlannedStage]
) -> None:
    """Refuse a model that is known to be of another kind."""
    if isinstance(model, Output):
        start = str(stages[model.stage].settings["model._target_"])
        kinds = {".PolicyStart": "policy", ".RewardStart": "reward model"}
        found = [kind for name, kind in kinds.items() if start.endswith(name)]
        if found and found != [wanted]:
            raise UserError(
                f"needs a {wanted}, but stage {model.stage} trains a {found[0]}: choose another "
                "module or experiment for it (choose.module=sft trains a policy)"
            )
    folder = _folder(model)
    files = {"policy": POLICY_FILE, "reward model": SPEC_FILE}
    other = next(kind for kind in files if kind != wanted)
    if folder is not None and (folder / files[other]).is_file():
        raise UserError(f"needs a {wanted}, but {model} is a {other}")


def _folder(model: Output | str | None) -> Path | None:
    """The folder of a model that is given; None if it is a stage's, or on the Hub."""
    if not isinstance(model, str):
        return None
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    # The Hub's are owner/name; and a killed export may have set an older one aside.
    if model.count("/") != 1 and not folder.with_name(f".{folder.name}.previous").is_dir():
        raise UserError(f"{model}: no such folder")
    return None


def _has_chat_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    return any("chat_template" in file.name for file in folder.iterdir()) or (
        settings.is_file() and '"chat_template"' in settings.read_text("utf-8", "replace")
    )
