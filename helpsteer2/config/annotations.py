"""Whether a configured value fits an annotation, judged from source alone.

A value is what YAML holds: None, bool, int, float, str, list, or dict. A dict with ``_target_``
stands for the object it will make. Whatever cannot be judged fits.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from helpsteer2.config.modules import (
    Definition,
    Imported,
    Module,
    NotFound,
    lookup_expression,
    resolve,
)
from helpsteer2.config.signatures import lineage

TARGET, PARTIAL = "_target_", "_partial_"

_STANDARD = {
    "typing", "typing_extensions", "collections.abc", "collections", "pathlib", "os", "functools",
    "types", "numbers", "abc",
}  # fmt: skip
_SEQUENCES = {
    "list", "List", "Sequence", "MutableSequence", "Iterable", "Collection", "set", "Set",
    "frozenset", "FrozenSet", "AbstractSet",
}  # fmt: skip
_MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping", "OrderedDict", "defaultdict"}
_CALLABLES = {"Callable", "partial"}
_PATHS = {"Path", "PurePath", "PathLike"}
_SCALARS = {"int", "float", "bool", "str"}
_WRAPPERS = {"Annotated", "Final", "Required", "NotRequired", "ReadOnly"}


@dataclass(frozen=True)
class Choice:
    """One member of a union.

    Attributes:
        label: How it is written in an error.
        accepts: Whether a value fits it.
        literal: The one allowed value if it is a member of ``Literal``, else None.
        value: Annotation of the values if it is a mapping, else None.
    """

    label: str
    accepts: Callable[[Any], bool]
    literal: Any = None
    value: ast.expr | None = None


def fits(value: Any, annotation: ast.expr | None, module: Module) -> bool:
    """Whether a value fits an annotation.

    Args:
        value: A plain value as YAML gives it.
        annotation: The annotation as written; None fits everything.
        module: Where the annotation's names are looked up.
    """
    if annotation is None:
        return True
    return any(choice.accepts(value) for choice in choices(annotation, module))


def choices(annotation: ast.expr, module: Module) -> Iterator[Choice]:
    """The members of an annotation's union, those that need no look-up first.

    Args:
        annotation: The annotation as written.
        module: Where its names are looked up.

    Yields:
        One choice a member; aliases are followed to what they stand for.
    """
    if isinstance(annotation, ast.Constant):
        if isinstance(annotation.value, str):
            yield from choices(ast.parse(annotation.value, mode="eval").body, module)
        elif annotation.value is None:
            yield Choice("None", lambda value: value is None)
        else:
            yield _anything(annotation)
    elif isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        yield from _union([annotation.left, annotation.right], module)
    elif isinstance(annotation, ast.Subscript):
        yield from _subscripted(annotation, module)
    else:
        yield from _named(annotation, module)


def _union(members: list[ast.expr], module: Module) -> Iterator[Choice]:
    def needs_lookup(member: ast.expr) -> bool:
        is_scalar = isinstance(member, ast.Name) and member.id in _SCALARS
        return not (is_scalar or isinstance(member, ast.Constant))

    for member in sorted(members, key=needs_lookup):
        yield from choices(member, module)


def _anything(annotation: ast.expr) -> Choice:
    return Choice(ast.unparse(annotation), lambda value: True)


def _standard_name(expression: ast.expr, module: Module) -> str | None:
    """Plain name of a builtin or of a member of the standard typing modules, else None."""
    if isinstance(expression, ast.Name):
        binding = module.bindings.get(expression.id)
        if binding is None:
            return expression.id if hasattr(builtins, expression.id) else None
        if isinstance(binding, Imported) and binding.module in _STANDARD:
            return binding.name
    if isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
        binding = module.bindings.get(expression.value.id)
        if isinstance(binding, Imported):
            owner = f"{binding.module}.{binding.name}" if binding.name else binding.module
            return expression.attr if owner in _STANDARD else None
    return None


def _subscripted(annotation: ast.Subscript, module: Module) -> Iterator[Choice]:
    name = _standard_name(annotation.value, module)
    inner = annotation.slice
    members = list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]
    if name == "Union":
        yield from _union(members, module)
    elif name == "Optional":
        yield Choice("None", lambda value: value is None)
        yield from choices(members[0], module)
    elif name in _WRAPPERS:
        yield from choices(members[0], module)
    elif name == "Literal":
        for member in members:
            yield _literal(member, module)
    elif name in {"tuple", "Tuple"}:
        yield Choice(ast.unparse(annotation), lambda value: _is_tuple(value, members, module))
    elif name in _SEQUENCES:
        yield Choice(
            ast.unparse(annotation),
            lambda value: _is_sequence(value, lambda item: fits(item, members[0], module)),
        )
    elif name in _MAPPINGS and len(members) == 2:
        yield Choice(
            ast.unparse(annotation),
            lambda value: _is_mapping(value, members, module),
            value=members[1],
        )
    else:
        # Callable[...], partial[...] and generic classes are judged by their name alone.
        yield from _named(annotation.value, module)


def _literal(member: ast.expr, module: Module) -> Choice:
    if not isinstance(member, ast.Constant):
        return _anything(member)
    allowed = member.value
    return Choice(
        repr(allowed),
        lambda value: type(value) is type(allowed) and value == allowed,
        literal=allowed,
    )


def _named(annotation: ast.expr, module: Module) -> Iterator[Choice]:
    name, label = _standard_name(annotation, module), ast.unparse(annotation)
    if name in _SCALARS:
        yield Choice(label, lambda value: _is_scalar(value, name or ""))
    elif name in _PATHS:
        yield Choice(label, lambda value: _is_scalar(value, "str"))
    elif name in _SEQUENCES or name in {"tuple", "Tuple"}:
        yield Choice(label, lambda value: _is_sequence(value, lambda item: True))
    elif name in _MAPPINGS:
        yield Choice(label, lambda value: isinstance(value, dict))
    elif name in _CALLABLES:
        yield Choice(label, _makes_object)
    elif name is not None:
        yield _anything(annotation)
    else:
        yield from _looked_up(annotation, module, label)


def _looked_up(annotation: ast.expr, module: Module, label: str) -> Iterator[Choice]:
    """Choices of a name that is bound in a module: a class, or an alias to be followed."""
    found = lookup_expression(module, annotation)
    if not isinstance(found, Definition):
        yield _anything(annotation)
    elif isinstance(found.node, ast.ClassDef):
        definition = found
        yield Choice(label, lambda value: _is_instance(value, definition))
    elif isinstance(
        found.node, ast.Subscript | ast.BinOp | ast.Constant | ast.Name | ast.Attribute
    ):
        if found.module is module and ast.dump(found.node) == ast.dump(annotation):
            yield _anything(annotation)
        else:
            yield from choices(found.node, found.module)
    else:
        # A TypeVar, a NewType, a function: nothing to hold the value against.
        yield _anything(annotation)


def _makes_object(value: Any) -> bool:
    return isinstance(value, dict) and TARGET in value


def _is_scalar(value: Any, name: str) -> bool:
    if _makes_object(value):
        return True
    if name == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value).__name__ == name


def _is_sequence(value: Any, item_fits: Callable[[Any], bool]) -> bool:
    return _makes_object(value) or (isinstance(value, list) and all(map(item_fits, value)))


def _is_tuple(value: Any, members: list[ast.expr], module: Module) -> bool:
    if isinstance(members[-1], ast.Constant) and members[-1].value is ...:
        return _is_sequence(value, lambda item: fits(item, members[0], module))
    if not isinstance(value, list):
        return _makes_object(value)
    return len(value) == len(members) and all(
        fits(item, member, module) for item, member in zip(value, members, strict=True)
    )


def _is_mapping(value: Any, members: list[ast.expr], module: Module) -> bool:
    if not isinstance(value, dict):
        return False
    return TARGET in value or all(
        fits(key, members[0], module) and fits(item, members[1], module)
        for key, item in value.items()
    )


def _is_instance(value: Any, expected: Definition) -> bool:
    """Whether a value may be an instance of a class: doubt counts as yes."""
    names, whole = _lineage_names(expected)
    if not isinstance(value, dict):
        return type(value).__name__ in _base_words(expected)
    if TARGET not in value:
        return not whole or any(name.endswith(".TypedDict") for name in names)
    if any(name.endswith(".Protocol") for name in names):
        return True
    if value.get(PARTIAL):
        return False
    try:
        made = resolve(str(value[TARGET]))
    except NotFound:
        return True  # told apart, where the node itself is checked
    if made is None or not isinstance(made.node, ast.ClassDef):
        return True
    made_names, made_whole = _lineage_names(made)
    return not made_whole or f"{expected.module.name}.{_name(expected)}" in made_names


def _name(definition: Definition) -> str:
    return getattr(definition.node, "name", "")


def _base_words(definition: Definition) -> set[str]:
    """Names written as bases of a class or of its bases: ``class Mode(str, Enum)``."""
    return {
        base.id
        for current in lineage(definition)
        if current is not None and isinstance(current.node, ast.ClassDef)
        for base in current.node.bases
        if isinstance(base, ast.Name)
    }


def _lineage_names(definition: Definition) -> tuple[set[str], bool]:
    """Dotted names of a class and its bases, and whether all of them could be read."""
    classes = list(lineage(definition))
    names = {f"{c.module.name}.{_name(c)}" for c in classes if c is not None}
    return names, None not in classes
