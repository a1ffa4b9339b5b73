"""The shape of the code: which room may import which, and rules that ruff cannot express."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "helpsteer2"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room imports itself and rooms of a lower floor, never one beside it.
FLOORS = [
    {"__init__", "errors"},
    {"attributes", "records", "functional"},
    {"data", "plots"},
    {"losses", "models", "world"},
    {"generation", "rewards"},
    {"rollouts"},
    {"modules"},
    {"callbacks", "evaluation"},
    {"config"},
    {"pipeline"},
    {"commands"},
    {"__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

HYDRA_ROOMS = {"config", "commands", "__main__"}
# Text becomes ids here and nowhere else.
TOKENISING = {"data/chat.py", "data/tokenise.py", "data/tokenizer.py"}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(module: str) -> str:
    """Room of a dotted name below the package; of the package itself ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node outside ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from [other, *nodes(other)]
            continue
        yield child
        yield from nodes(child)


def imported(source: str) -> Iterator[str]:
    """Dotted names that a module imports at run time, at its top or inside functions."""
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            # `from helpsteer2 import errors` imports helpsteer2.errors.
            inner = node.module == "helpsteer2"
            yield from (
                f"{node.module}.{a.name}" if inner else str(node.module) for a in node.names
            )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            # A name put together at run time is the command line's way of being late.
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def broken(name: str, source: str) -> list[str]:
    """Imports of a module that go the wrong way."""
    own = name.split("/")[0].removesuffix(".py")
    found = []
    for module in imported(source):
        top = module.split(".")[0]
        if top == "helpsteer2":
            other = room_of(module)
            if other not in FLOOR_OF and module.count(".") == 1:
                other = "__init__"  # a name of the package, as __version__
            if other != own and FLOOR_OF[other] >= FLOOR_OF[own]:
                found.append(f"{name}: {own} imports {module}")
        elif top in {"hydra", "omegaconf"} and own not in HYDRA_ROOMS:
            found.append(f"{name}: only {', '.join(sorted(HYDRA_ROOMS))} may import {top}")
        elif top == "lightning":
            found.append(f"{name}: import pytorch_lightning, not lightning")
    return found


def test_imports_go_one_way() -> None:
    wrong = [line for path in MODULES for line in broken(relative(path), path.read_text("utf-8"))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("data/chat.py", "from helpsteer2.models.reward import RewardModel"),
        ("data/chat.py", "def f():\n    import helpsteer2.models"),
        ("losses/regression.py", "from helpsteer2 import modules"),
        ("callbacks/log.py", "from helpsteer2.evaluation.report import tables"),
        ("modules/regression.py", "from omegaconf import DictConfig"),
        ("models/reward.py", "import lightning.pytorch as pl"),
        ("errors.py", "from importlib import import_module\nimport_module('helpsteer2.data')"),
    ],
)
def test_a_wrong_import_is_found(name: str, source: str) -> None:
    assert len(broken(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("data/chat.py", "from helpsteer2.data.groups import Group"),
        ("models/reward.py", "from helpsteer2.data.packing import PackedBatch"),
        ("data/x.py", "if TYPE_CHECKING:\n    from helpsteer2.models.reward import RewardModel"),
        ("commands/train.py", "import hydra\nimport helpsteer2"),
    ],
)
def test_a_right_import_passes(name: str, source: str) -> None:
    assert broken(name, source) == []


def test_every_room_has_a_floor() -> None:
    rooms = {relative(path).split("/")[0].removesuffix(".py") for path in MODULES}
    assert rooms <= set(FLOOR_OF)


def test_functional_needs_no_other_room_and_no_heavy_package() -> None:
    allowed = {*sys.stdlib_module_names, "helpsteer2", "torch", "numpy", "scipy"}
    for path in (PACKAGE / "functional").rglob("*.py"):
        modules = set(imported(path.read_text("utf-8")))
        assert {name.split(".")[0] for name in modules} <= allowed, path
        assert all(name.startswith("helpsteer2.functional") for name in modules if "helps" in name)


def test_text_becomes_ids_in_one_place() -> None:
    """Anywhere else a template's special tokens would be added twice or not at all."""
    wrong = []
    for path in MODULES:
        if relative(path) in TOKENISING:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if re.search(r"\btokenizer(\.encode)?$|\.apply_chat_template$", called):
                    wrong.append(f"{relative(path)}:{node.lineno}: {called}(")
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_stay_small() -> None:
    wrong = []
    for path in [*MODULES, *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text("utf-8")
        if len(text.splitlines()) > 400:
            wrong.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines, 400 at most")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and path in MODULES:
                doc = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno
                assert doc is not None
                assert node.end_lineno is not None
                if node.end_lineno - doc > 60:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} is too long")
    assert not wrong, "\n".join(wrong)


def test_importing_the_package_and_the_command_line_is_light() -> None:
    code = "import helpsteer2, helpsteer2.__main__, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "transformers", "pytorch_lightning", "datasets", "wandb", "hydra"}
    assert not heavy & set(loaded.stdout.split())
