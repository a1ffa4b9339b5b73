"""Python modules read as source, never imported: where a dotted name is defined."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.machinery import ModuleSpec
from pathlib import Path


@dataclass(frozen=True)
class Imported:
    """A name bound by an import: an attribute of a module, or (``name`` None) the module."""

    module: str
    name: str | None


Binding = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.expr | Imported


@dataclass(frozen=True)
class Definition:
    """What a name stands for, with the module in which its own names are looked up."""

    module: Module
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.expr

    @property
    def name(self) -> str:
        """Its own name; empty for an expression."""
        return getattr(self.node, "name", "")

    @property
    def full_name(self) -> str:
        """Its dotted name, where it is defined."""
        return f"{self.module.name}.{self.name}"


@dataclass(eq=False)
class Module:
    """The source of one module.

    Attributes:
        name: Absolute dotted name.
        path: Its file.
        is_package: Whether the file is an ``__init__.py``.
    """

    name: str
    path: Path
    is_package: bool
    star_imports: list[str] = field(default_factory=list)

    @cached_property
    def bindings(self) -> dict[str, Binding]:
        """What each name at module level is bound to, the last binding winning."""
        names: dict[str, Binding] = {}
        for statement in _statements(ast.parse(self.path.read_bytes()).body):
            if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names[statement.name] = statement
            elif isinstance(statement, ast.Assign):
                targets = [t for t in statement.targets if isinstance(t, ast.Name)]
                names.update({target.id: statement.value for target in targets})
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                if statement.value is not None:
                    names[statement.target.id] = statement.value
            elif isinstance(statement, ast.Import):
                for alias in statement.names:
                    top = alias.name.partition(".")[0]
                    names[alias.asname or top] = Imported(alias.name if alias.asname else top, None)
            elif isinstance(statement, ast.ImportFrom):
                self._bind_from(statement, names)
        return names

    def _bind_from(self, statement: ast.ImportFrom, names: dict[str, Binding]) -> None:
        """Bind the names of a ``from … import``, relative ones made absolute."""
        source = statement.module or ""
        if statement.level:
            parents = self.name.split(".")
            drop = statement.level - 1 if self.is_package else statement.level
            base = ".".join(parents[: len(parents) - drop])
            source = f"{base}.{source}" if source else base
        for alias in statement.names:
            if alias.name == "*":
                self.star_imports.append(source)
            else:
                names[alias.asname or alias.name] = Imported(source, alias.name)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Module-level statements, those of alternative branches before the preferred ones."""
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _statements(statement.orelse)
            yield from _statements(statement.body)
        elif isinstance(statement, ast.Try):
            for handler in statement.handlers:
                yield from _statements(handler.body)
            yield from _statements(statement.body + statement.orelse + statement.finalbody)
        elif isinstance(statement, ast.With):
            yield from _statements(statement.body)
        else:
            yield statement


def _find_spec(name: str, path: list[str] | None) -> ModuleSpec | None:
    """Ask the import system where a module lies; given a path, no parent gets imported."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = find(name, path) if find is not None else None
        if spec is not None:
            return spec
    return None


@cache
def find_spec(name: str) -> ModuleSpec | None:
    """Locate a module or package without importing it or its parents.

    Args:
        name: Absolute dotted name.

    Returns:
        Its spec, or None if there is none.
    """
    parent, _, _ = name.rpartition(".")
    if not parent:
        return _find_spec(name, None)
    parent_spec = find_spec(parent)
    if parent_spec is None or parent_spec.submodule_search_locations is None:
        return None
    return _find_spec(name, list(parent_spec.submodule_search_locations))


@cache
def find_module(name: str) -> Module | None:
    """Locate the source of a module without importing it.

    Args:
        name: Absolute dotted name.

    Returns:
        The module, or None if there is none or it has no Python source.
    """
    spec = find_spec(name)
    if spec is None:
        return None
    # Parts of the standard library are frozen into the interpreter, with a file all the same.
    file = spec.origin if spec.origin != "frozen" else getattr(spec.loader_state, "filename", None)
    if file is None or not file.endswith(".py"):
        return None
    return Module(name, Path(file), spec.submodule_search_locations is not None)


class NotFound(LookupError):
    """A dotted name that certainly does not exist.

    Args:
        message: What is missing.
        candidates: Names that do exist there.
    """

    def __init__(self, message: str, candidates: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.candidates = candidates


def lookup(module: Module, name: str) -> Definition | Module | None:
    """Follow a name of a module to its definition, through imports and re-exports.

    Args:
        module: Where the name is used.
        name: A plain name.

    Returns:
        A class, function or expression; a module; or None where source alone cannot tell.
    """
    return _lookup(module, name, frozenset())


def _lookup(
    module: Module, name: str, visited: frozenset[tuple[str, str]]
) -> Definition | Module | None:
    if (module.name, name) in visited:
        return None
    visited |= {(module.name, name)}
    binding = module.bindings.get(name)
    if isinstance(binding, Imported):
        source = find_module(binding.module)
        if binding.name is None:
            return source
        if source is None:
            return find_module(f"{binding.module}.{binding.name}")
        return _lookup(source, binding.name, visited)
    if isinstance(binding, ast.Name | ast.Attribute):
        return lookup_expression(module, binding, visited) or Definition(module, binding)
    if binding is not None:
        return Definition(module, binding)
    for star in module.star_imports:
        source = find_module(star)
        found = _lookup(source, name, visited) if source is not None else None
        if found is not None:
            return found
    return find_module(f"{module.name}.{name}") if module.is_package else None


def lookup_expression(
    module: Module,
    expression: ast.expr,
    visited: frozenset[tuple[str, str]] = frozenset(),
) -> Definition | Module | None:
    """Follow ``a`` or ``a.b.c`` to its definition; None where source alone cannot tell."""
    if isinstance(expression, ast.Name):
        return _lookup(module, expression.id, visited)
    if isinstance(expression, ast.Attribute):
        owner = lookup_expression(module, expression.value, visited)
        return _member(owner, expression.attr, visited) if owner is not None else None
    return None


def _member(
    owner: Definition | Module, name: str, visited: frozenset[tuple[str, str]] = frozenset()
) -> Definition | Module | None:
    """A name inside a module or a class body."""
    if isinstance(owner, Module):
        return _lookup(owner, name, visited)
    if isinstance(owner.node, ast.ClassDef):
        for statement in owner.node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == name:
                return Definition(owner.module, statement)
    return None


def resolve(target: str) -> Definition | None:
    """Find what a ``_target_`` names.

    Args:
        target: Dotted path such as ``torch.optim.AdamW``.

    Returns:
        Its definition, or None where source alone cannot tell (compiled code, dynamic names).

    Raises:
        NotFound: If the module or the name in it certainly does not exist.
    """
    parts = target.split(".")
    if find_spec(parts[0]) is None:
        raise NotFound(f"no module named {parts[0]!r} is installed")
    depth = 1
    while depth < len(parts) and find_spec(".".join(parts[: depth + 1])) is not None:
        depth += 1
    name, rest = ".".join(parts[:depth]), parts[depth:]
    found: Definition | Module | None = find_module(name)
    if not rest:
        raise NotFound(f"{name} is a module, not a class or function", public_names(found))
    for part in rest:
        if found is None:
            return None
        inner = _member(found, part)
        if inner is None and isinstance(found, Module) and not _may_be_dynamic(found, part):
            raise NotFound(f"{found.name} has no {part!r}", public_names(found))
        found = inner
    return found if isinstance(found, Definition) else None


def _may_be_dynamic(module: Module, name: str) -> bool:
    """Whether a module may hold a name that its source does not bind."""
    bindings = module.bindings
    return "__getattr__" in bindings or bool(module.star_imports) or name in bindings


def public_names(module: Definition | Module | None) -> tuple[str, ...]:
    """Names a module offers, its submodules included, for near misses."""
    if not isinstance(module, Module):
        return ()
    names = {name for name in module.bindings if not name.startswith("_")}
    if module.is_package:
        names |= {path.stem for path in module.path.parent.glob("[a-z]*.py")}
    return tuple(sorted(names))
