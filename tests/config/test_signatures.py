"""Signatures read from source agree with those that Python sees."""

from __future__ import annotations

import ast
import inspect
import sys
from importlib import import_module
from typing import Any

import pytest

from helpsteer2.config.annotations import fits
from helpsteer2.config.modules import NotFound, find_module, resolve
from helpsteer2.config.signatures import NO_DEFAULT, UNKNOWN_DEFAULT, read_signature


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.LambdaLR",
        "torch.nn.Linear",
        "pytorch_lightning.Trainer",
        "pytorch_lightning.loggers.WandbLogger",
        "pytorch_lightning.loggers.CSVLogger",
        "helpsteer2.attributes.AttributeWeights",
        "helpsteer2.losses.regression.RegressionLoss",
        "helpsteer2.data.sources.helpsteer.HelpSteer2",
        "helpsteer2.models.backbone.Backbone",
        "helpsteer2.commands.train.train",
        "helpsteer2.commands.evaluate.evaluate",
    ],
)
def test_signature_is_the_one_python_sees(target: str) -> None:
    read = read_signature(target)
    module, _, name = target.rpartition(".")
    real = inspect.signature(getattr(import_module(module), name)).parameters
    assert read is not None
    kinds = {parameter.kind for parameter in real.values()}
    assert read.accepts_any_keyword == (inspect.Parameter.VAR_KEYWORD in kinds)
    named = {
        key: parameter
        for key, parameter in real.items()
        if parameter.kind not in {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    }
    assert list(read.parameters) == list(named)
    for key, parameter in named.items():
        default = read.parameters[key].default
        if parameter.default is inspect.Parameter.empty:
            assert default is NO_DEFAULT
        else:
            assert default is UNKNOWN_DEFAULT or default == parameter.default


def test_dataclass_takes_inherited_fields_and_skips_those_it_does_not_take(project: Any) -> None:
    signature = read_signature(f"{project.package}.parts.Turbo")
    assert signature is not None
    assert list(signature.parameters) == ["width", "rate", "size", "hidden"]
    assert signature.parameters["width"].default is NO_DEFAULT
    assert signature.parameters["rate"].default == 0.5
    assert signature.parameters["hidden"].default is UNKNOWN_DEFAULT


@pytest.mark.parametrize(
    "line", ["from .parts import Engine as Motor", "from .parts import *\nMotor = Engine"]
)
def test_reexports_are_followed(project: Any, line: str) -> None:
    project.write(f"{project.package}/parts.py", "class Engine:\n    def __init__(self, a): ...\n")
    project.write(f"{project.package}/sub/__init__.py", "from ..shim import Motor\n")
    project.write(f"{project.package}/shim.py", f"{line}\n")
    signature = read_signature(f"{project.package}.sub.Motor")
    assert signature is not None
    assert list(signature.parameters) == ["a"]


def test_circular_imports_end(project: Any) -> None:
    project.write(f"{project.package}/one.py", "from .two import thing\n")
    project.write(f"{project.package}/two.py", "from .one import thing\n")
    assert resolve(f"{project.package}.one.thing") is None


def test_unknown_names_are_told_apart_from_unreadable_ones(project: Any) -> None:
    with pytest.raises(NotFound, match="no module named"):
        resolve("no_such_package_at_all.thing")
    with pytest.raises(NotFound) as caught:
        resolve(f"{project.package}.parts.Motor")
    assert "Engine" in caught.value.candidates
    # Compiled code has no source: nothing can be said against it.
    assert resolve("math.sqrt") is None
    assert read_signature("_struct.Struct") is None


def test_nothing_is_imported_while_reading(project: Any) -> None:
    read_signature(f"{project.package}.parts.Engine")
    assert project.package not in sys.modules


def made(name: str, **more: Any) -> dict[str, Any]:
    return {"_target_": f"PACKAGE.parts.{name}", **more}


CASES: list[tuple[str, list[Any], list[Any]]] = [
    ("int", [1, 0], [True, 1.0, "1", None, [1], {"a": 1}]),
    ("float", [1, 1.5, 1e-5], [True, "1e-5", None, [1.0]]),
    ("bool", [True, False], [0, 1, "true", None]),
    ("str", ["a", ""], [1, 1.5, True, None, ["a"]]),
    ("None", [None], [0, "", "None"]),
    ("int | None", [1, None], ["1", 1.5]),
    ("'Optional[float]'", [1, None, 0.5], ["1"]),
    ("Union[bool, list[int]]", [True, [1], []], [1, ["a"], [True]]),
    ("Literal['a', 1]", ["a", 1], ["b", True, "1", None]),
    ("Sequence[str]", [["a"], []], ["a", [1], {"a": "b"}, None]),
    ("tuple[float, float]", [[1, 0.5]], [[1], [1, 2, 3], ["a", "b"], 0.5]),
    ("tuple[str, ...]", [[], ["a", "b"]], [[1], "a"]),
    ("Mapping[str, float]", [{}, {"a": 1}], [{"a": "b"}, {1: 1.0}, [1.0], 3]),
    ("dict", [{}, {"a": "b"}], [[], "a"]),
    ("Path", ["a/b"], [3, None]),
    ("Callable[..., int]", [{"_target_": "math.sqrt", "_partial_": True}], ["math.sqrt", 3, {}]),
    ("Size", ["small"], ["tiny", None, 3]),
    ("Sizes", ["small", None], ["tiny"]),
    ("Any", [1, "a", None, [], {}], []),
    ("NeverHeardOfIt", [1, "a", None], []),
    ("Annotated[int, 'unit']", [1], ["1"]),
    ("Engine", [made("Engine"), made("Turbo"), made("build"), {"_target_": "math.sqrt"}],
     [made("Wheel"), made("Engine", _partial_=True), 3, "x", None, {"width": 3}]),
    ("Drives", [made("Wheel")], [3, "x", {"a": 1}]),
    ("Color", ["red"], [3, 1.5]),
]  # fmt: skip

NAMES = """
from typing import Annotated, Any, Literal, Optional, Union
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from .parts import Drives, Engine, Size, Sizes
class Color(str): ...
"""


@pytest.mark.parametrize(("annotation", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_values_fit_annotations(
    project: Any, annotation: str, good: list[Any], bad: list[Any]
) -> None:
    project.write(f"{project.package}/names.py", NAMES)
    module = find_module(f"{project.package}.names")
    assert module is not None
    expression = ast.parse(annotation, mode="eval").body

    def value(raw: Any) -> Any:
        target = raw.get("_target_") if isinstance(raw, dict) else None
        if target is None:
            return raw
        return {**raw, "_target_": target.replace("PACKAGE", project.package)}

    for raw in good:
        assert fits(value(raw), expression, module), raw
    for raw in bad:
        assert not fits(value(raw), expression, module), raw
