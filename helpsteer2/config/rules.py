"""Combinations of good values that cannot work together, one small function a rule."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from helpsteer2.config.modules import Definition, Module, NotFound, lookup_expression, resolve
from helpsteer2.config.on_policy import ON_POLICY_RULES
from helpsteer2.config.ranges import (
    greedy_samples_differ,
    numbers_are_in_range,
    policies_are_sampled_as_they_are,
)
from helpsteer2.config.signatures import lineage, read_signature

Finding = tuple[str, str]
"""Dotted path of a value, and what is wrong with it."""


class Settings:
    """A checked configuration with its defaults filled in.

    Args:
        filled: Plain containers; None stands for null, for unknown, and for a value already found
            to be wrong.
        given: The same without defaults.
    """

    def __init__(self, filled: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        self._filled = filled
        self._given = given

    @property
    def filled(self) -> Mapping[str, Any]:
        """The whole configuration with its defaults, as plain containers."""
        return self._filled

    def __getitem__(self, path: str) -> Any:
        """The value at a dotted path, None if there is none."""
        return _select(self._filled, path)

    def given(self, path: str) -> Any:
        """The value that a file or an override holds at a dotted path, None if there is none."""
        return _select(self._given, path)

    def nodes(self) -> Iterator[tuple[str, str]]:
        """Every node that builds something: its dotted path, and what it builds."""
        yield from _nodes(self._filled, "")

    def texts(self) -> Iterator[tuple[str, str]]:
        """Every text that a file or an override holds, with its dotted path."""
        yield from _texts(self._given, "")

    def number(self, path: str) -> float | None:
        """The number at a dotted path, None if there is none."""
        value = self[path]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number else None


def _texts(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, item in node.items():
            yield from _texts(item, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for item in node:
            yield from _texts(item, path)
    elif isinstance(node, str):
        yield path, node


def _nodes(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if not isinstance(node, Mapping):
        return
    if isinstance(node.get("_target_"), str):
        yield path, node["_target_"]
    for key, item in node.items():
        yield from _nodes(item, f"{path}.{key}" if path else str(key))


def _select(node: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


Rule = Callable[[Settings], Iterator[Finding]]


def precision_keeps_master_weights(settings: Settings) -> Iterator[Finding]:
    """Pure half precision absorbs a small update whole: the weights never move."""
    precision = settings["trainer.precision"]
    if precision not in {None, 32, "32", "32-true", "bf16-mixed"}:
        yield (
            "trainer.precision",
            f"{precision} keeps no fp32 master weights or needs loss scaling: use 32-true or "
            "bf16-mixed",
        )
    dtype, adapters = settings["backbone.dtype"], settings["backbone.lora"]
    if dtype in {"bfloat16", "float16"} and adapters is None:
        yield (
            "backbone.dtype",
            f"{dtype} weights have no fp32 master copy, so small updates are rounded away: keep "
            "float32 and set trainer.precision=bf16-mixed, or freeze them with lora=default",
        )


def backbone_has_a_source(settings: Settings) -> Iterator[Finding]:
    """Weights come from a folder or the Hub; random ones need a shape."""
    path, config, init = (settings[f"backbone.{key}"] for key in ("path", "config", "init"))
    if init == "pretrained":
        if path is None:
            yield (
                "backbone.path",
                "init=pretrained needs a folder or Hub id: give backbone.path=…, or choose "
                "backbone.init=random with backbone.config",
            )
        if str(settings["backbone.tokenizer._target_"]).endswith(".TrainedTokenizer"):
            yield (
                "backbone.tokenizer",
                "init=pretrained needs the tokenizer that the weights were trained with: use "
                "PretrainedTokenizer",
            )
    if init == "random" and path is None and not (config and config.get("model_type")):
        yield (
            "backbone.config",
            "init=random needs a shape: give backbone.config with model_type, or backbone.path to "
            "take it from",
        )


def attention_runs_on_the_device(settings: Settings) -> Iterator[Finding]:
    """The flex and flash kernels exist for GPUs alone."""
    for path in ("backbone.attention", "attention"):
        on_cpu = "cpu" in (settings["trainer.accelerator"], settings["device"])
        if settings[path] in {"flash", "flex"} and on_cpu:
            yield path, f"{settings[path]} needs a GPU; use auto or sdpa on the CPU"


def every_device_gets_a_group(settings: Settings) -> Iterator[Finding]:
    """A step of fewer groups than ranks would leave ranks without work."""
    global_batch = settings.number("batching.global_batch")
    ranks = _ranks(settings)
    if global_batch is not None and ranks is not None and 1 <= global_batch < ranks:
        yield (
            "batching.global_batch",
            f"{global_batch} groups a step cannot be shared by {ranks} devices",
        )


def _ranks(settings: Settings) -> int | None:
    devices, nodes = settings["trainer.devices"], settings["trainer.num_nodes"]
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        devices = len(devices)
    if not isinstance(devices, int) or not isinstance(nodes, int) or devices < 1:
        return None
    return devices * nodes


def training_ends(settings: Settings) -> Iterator[Finding]:
    """One of the two lengths has to be given."""
    if settings["batching"] is None:
        return
    if settings["batching.epochs"] is None and settings["batching.max_steps"] is None:
        yield "batching.epochs", "is null like batching.max_steps: give one of them"


def _is_policy(settings: Settings) -> bool:
    """Whether the model has no scores, so that attributes are not read."""
    return str(settings["model._target_"]).endswith(".PolicyStart")


def weightings_name_trained_attributes(settings: Settings) -> Iterator[Finding]:
    """A weighting of an attribute that the model does not score can never be applied."""
    attributes = settings["attributes"]
    if not isinstance(attributes, list) or _is_policy(settings):
        return
    for path in ("weights.values", "module.loss.attribute_loss_weights"):
        weights = settings[path]
        if not isinstance(weights, Mapping):
            continue
        unknown = [name for name, weight in weights.items() if weight and name not in attributes]
        if unknown:
            yield (
                path,
                f"names {', '.join(map(str, unknown))}, but attributes are "
                f"{', '.join(map(str, attributes))}",
            )
        elif not any(weights.values()):
            yield path, "gives every attribute a weight of 0"


def attributes_are_named_once(settings: Settings) -> Iterator[Finding]:
    """Each attribute is one output of the model."""
    attributes = settings["attributes"]
    if not isinstance(attributes, list):
        return
    if not attributes and not _is_policy(settings):
        yield "attributes", "is empty: name at least one"
    repeated = sorted({str(name) for name in attributes if attributes.count(name) > 1})
    if repeated:
        yield "attributes", f"names {', '.join(repeated)} more than once"


def preferences_train_one_score(settings: Settings) -> Iterator[Finding]:
    """A pair is decided by one difference of scores."""
    attributes = settings["attributes"]
    is_preference = str(settings["module._target_"]).endswith(".PreferenceModule")
    if is_preference and isinstance(attributes, list) and len(attributes) > 1:
        yield (
            "attributes",
            f"a preference is learned by one score, here are {len(attributes)}: name one, "
            f"attributes=[{attributes[0]}] for example",
        )


def reference_goes_with_its_loss(settings: Settings) -> Iterator[Finding]:
    """DPO and its kin and SteerLM 2.0 compare with a reference; the other losses read none."""
    module, reference = settings["module._target_"], settings["reference"]
    if not isinstance(module, str):
        return
    wanted = module.endswith((".DPOModule", ".RPOModule", ".SteerLM2Module"))
    if wanted and reference is None:
        yield (
            "reference",
            "is not given, but the module compares the policy with a reference: compute its "
            "log-probabilities with helpsteer2 reference model=POLICY run_dir=DIR, on the same "
            "data, and set reference=DIR/reference",
        )
    elif module.startswith("helpsteer2.") and not wanted and reference is not None:
        samples = settings.given("rollouts") is not None
        hint = "; KL divergences are measured from rollouts.reference=POLICY" if samples else ""
        yield "reference", f"{module.rpartition('.')[2]} reads no reference: leave it out{hint}"


def module_trains_the_model(settings: Settings) -> Iterator[Finding]:
    """``model`` has to build what the module's argument of that name asks for."""
    start, module = settings["model._target_"], settings["module._target_"]
    if not isinstance(start, str) or not isinstance(module, str):
        return
    try:
        made, wanted = _built_by(start), _wanted_by(module)
    except NotFound:
        return  # told where the node itself is checked
    if made is None or wanted is None:
        return
    family = {parent.full_name for parent in lineage(made) if parent is not None}
    if wanted.full_name not in family:
        yield (
            "model",
            f"builds a {made.name}, but {module.rpartition('.')[2]} trains a {wanted.name}: "
            "leave start@model=… out, module=… chooses it",
        )


def _built_by(start: str) -> Definition | None:
    """The class that a ``model`` builds, as the annotation of its method names it."""
    build = resolve(f"{start}.build")
    if build is None or not isinstance(build.node, ast.FunctionDef) or build.node.returns is None:
        return None
    return _class(lookup_expression(build.module, build.node.returns))


def _wanted_by(module: str) -> Definition | None:
    """The class of the models that a module trains; None if there are several."""
    signature = read_signature(module)
    wanted = None if signature is None else signature.parameters.get("model")
    if wanted is None or wanted.annotation is None:
        return None
    return _class(lookup_expression(wanted.module, wanted.annotation))


def _class(found: Definition | Module | None) -> Definition | None:
    is_class = isinstance(found, Definition) and isinstance(found.node, ast.ClassDef)
    return found if isinstance(found, Definition) and is_class else None


SET_BY_RUN = {
    "max_epochs": "batching.epochs",
    "max_steps": "batching.max_steps",
    "min_epochs": "batching.epochs",
    "min_steps": "batching.max_steps",
    "max_time": "batching.max_steps (a run that is stopped goes on where it was)",
    "overfit_batches": "a smaller data set",
    "num_sanity_val_steps": "schedule.validate_every",
    "limit_train_batches": "batching.max_steps",
    "fast_dev_run": "batching.max_steps=1",
    "accumulate_grad_batches": "batching.tokens_per_microbatch",
    "gradient_clip_val": "module.gradient_clip",
    "val_check_interval": "schedule.validate_every",
    "check_val_every_n_epoch": "schedule.validate_every",
    "limit_val_batches": "schedule.validate_every",
    "default_root_dir": "run_dir",
    "logger": "logger",
    "enable_checkpointing": "schedule.checkpoint_every",
}
"""Arguments of the Trainer that the run sets itself, and the key that decides them."""


def trainer_leaves_steps_to_the_run(settings: Settings) -> Iterator[Finding]:
    """Steps, clipping, cadence and folders have one key each, which is not the Trainer's."""
    for name, instead in SET_BY_RUN.items():
        if settings.given(f"trainer.{name}") not in (None, False):
            yield f"trainer.{name}", f"is set by the run itself: use {instead}"


def strategy_copies_the_model(settings: Settings) -> Iterator[Finding]:
    """The step gathers gradients itself, which sharded weights do not allow."""
    strategy = settings["trainer.strategy"]
    if isinstance(strategy, str) and not strategy.startswith(("auto", "ddp")):
        yield "trainer.strategy", f"{strategy} is not supported: use auto or ddp"


def run_folder_can_be_made(settings: Settings) -> Iterator[Finding]:
    """The nearest folder that exists has to let us write."""
    run_dir = settings["run_dir"]
    if not isinstance(run_dir, str):
        return
    if run_dir.startswith("~"):
        yield "run_dir", "the shell does not expand ~ after =: write $HOME"
        return
    folder = Path(run_dir).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        yield "run_dir", f"{folder} is a file, not a folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield "run_dir", f"no permission to write in {folder}"


READ_PATHS = {"model", "weak", "strong", "reward_model"}
"""Keys whose value may be a path."""

READ_NAMES = {"path", "init_from", "reference", "statistics"}
"""Last parts of such keys, wherever they stand."""


def local_paths_are_there(settings: Settings) -> Iterator[Finding]:
    """What can only be a local path has to exist; anything else may be a Hub id, or be made yet."""
    missing: dict[str, str] = {}
    for place, path in settings.texts():
        name = place.rpartition(".")[2]
        is_read = place in READ_PATHS or name in READ_NAMES
        if is_read and path.startswith(("/", "./", "../", "~")) and not _exists(path):
            # Told where it was given: other keys may take it from there.
            missing[path] = min(place, missing.get(path, place), key=lambda key: key.count("."))
    for path, place in missing.items():
        yield place, f"there is no file or folder {path}"


def _exists(path: str) -> bool:
    """Whether a path is there, or the folder that a killed export has set aside for it."""
    local = Path(path).expanduser()
    return local.exists() or bool(
        local.name and local.with_name(f".{local.name}.previous").exists()
    )


RULES: tuple[Rule, ...] = (
    precision_keeps_master_weights,
    backbone_has_a_source,
    attention_runs_on_the_device,
    every_device_gets_a_group,
    training_ends,
    numbers_are_in_range,
    greedy_samples_differ,
    policies_are_sampled_as_they_are,
    weightings_name_trained_attributes,
    attributes_are_named_once,
    preferences_train_one_score,
    reference_goes_with_its_loss,
    module_trains_the_model,
    trainer_leaves_steps_to_the_run,
    strategy_copies_the_model,
    run_folder_can_be_made,
    local_paths_are_there,
    *ON_POLICY_RULES,
)
"""Every rule, in the order in which findings are shown."""
