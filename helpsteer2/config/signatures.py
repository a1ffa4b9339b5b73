"""Signatures read from source, so that a configuration is checked without importing torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from helpsteer2.config.modules import Definition, Module, lookup_expression, resolve

NO_DEFAULT = object()
"""Default of a parameter that has to be given."""

UNKNOWN_DEFAULT = object()
"""Default that is no literal, so that source alone cannot tell its value."""

_MAX_BASES = 50


@dataclass(frozen=True)
class Parameter:
    """One argument of a call.

    Attributes:
        name: Its keyword.
        annotation: The annotation as written, None if there is none.
        module: Where the annotation's names are looked up.
        default: The literal, ``UNKNOWN_DEFAULT`` or ``NO_DEFAULT``.
    """

    name: str
    annotation: ast.expr | None
    module: Module
    default: Any


@dataclass(frozen=True)
class Signature:
    """What a call accepts.

    Attributes:
        parameters: The named arguments, in order.
        accepts_any_keyword: Whether there is a ``**kwargs``.
    """

    parameters: dict[str, Parameter] = field(default_factory=dict)
    accepts_any_keyword: bool = False


def read_signature(target: str) -> Signature | None:
    """Read the signature of a class or function from its source.

    Args:
        target: Dotted path, as in ``_target_``.

    Returns:
        The signature, ``self`` left out; None where source alone cannot tell.

    Raises:
        NotFound: If there is no such class or function.
    """
    definition = resolve(target)
    return signature_of(definition) if definition is not None else None


def signature_of(definition: Definition) -> Signature | None:
    """Signature of a definition; None where source alone cannot tell.

    Args:
        definition: A class, a function or (unknown) any other expression.
    """
    node, module = definition.node, definition.module
    if isinstance(node, ast.ClassDef):
        return _class_signature(definition)
    if isinstance(node, ast.FunctionDef):
        names = [_decorator_name(decorator) for decorator in node.decorator_list]
        is_method = "classmethod" in names
        return _function_signature(module, node, skip_first=is_method)
    return None


def lineage(definition: Definition) -> Iterator[Definition | None]:
    """A class and its bases, depth first; None stands for a base that cannot be read."""
    pending: list[Definition | None] = [definition]
    seen: set[tuple[str, str]] = set()
    while pending and len(seen) < _MAX_BASES:
        current = pending.pop(0)
        if current is None or not isinstance(current.node, ast.ClassDef):
            yield None
            continue
        key = (current.module.name, current.node.name)
        if key in seen:
            continue
        seen.add(key)
        yield current
        pending = [*_bases(current.module, current.node), *pending]


def _bases(module: Module, node: ast.ClassDef) -> list[Definition | None]:
    bases: list[Definition | None] = []
    for base in node.bases:
        expression = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(expression, ast.Name) and expression.id == "object":
            continue
        found = lookup_expression(module, expression)
        bases.append(found if isinstance(found, Definition) else None)
    return bases


def _class_signature(definition: Definition) -> Signature | None:
    for current in lineage(definition):
        if current is None:
            return None
        assert isinstance(current.node, ast.ClassDef)
        methods = {s.name: s for s in current.node.body if isinstance(s, ast.FunctionDef)}
        constructor = methods.get("__init__") or methods.get("__new__")
        if constructor is not None:
            return _function_signature(current.module, constructor, skip_first=True)
        if is_dataclass(current.node):
            return _dataclass_signature(current)
    return Signature()


def _decorator_name(decorator: ast.expr) -> str:
    call = decorator.func if isinstance(decorator, ast.Call) else decorator
    return call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "")


def is_dataclass(node: ast.ClassDef) -> bool:
    """Whether a class is decorated with ``@dataclass``."""
    return any(_decorator_name(decorator) == "dataclass" for decorator in node.decorator_list)


def _literal(expression: ast.expr) -> Any:
    """The value of a literal expression, ``UNKNOWN_DEFAULT`` if it is none."""
    try:
        return ast.literal_eval(expression)
    except (ValueError, TypeError, SyntaxError):
        return UNKNOWN_DEFAULT


def _function_signature(module: Module, node: ast.FunctionDef, skip_first: bool) -> Signature:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(named) - len(arguments.defaults))
    defaults += arguments.defaults
    pairs = list(zip(named, defaults, strict=True))[1 if skip_first else 0 :]
    pairs += list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    parameters = {
        argument.arg: Parameter(
            argument.arg,
            argument.annotation,
            module,
            NO_DEFAULT if default is None else _literal(default),
        )
        for argument, default in pairs
    }
    return Signature(parameters, accepts_any_keyword=arguments.kwarg is not None)


def _dataclass_signature(definition: Definition) -> Signature | None:
    """Fields of a dataclass, inherited ones first, as its generated ``__init__`` takes them."""
    classes = list(lineage(definition))
    if None in classes:
        return None
    parameters: dict[str, Parameter] = {}
    for current in reversed(classes):
        assert current is not None
        assert isinstance(current.node, ast.ClassDef)
        if not is_dataclass(current.node):
            continue
        for statement in current.node.body:
            parameter = _field(current.module, statement)
            if parameter is not None:
                parameters[parameter.name] = parameter
    return Signature(parameters)


def _field(module: Module, statement: ast.stmt) -> Parameter | None:
    """The argument made of one line of a dataclass's body, if it makes one."""
    if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
        return None
    annotation, default = statement.annotation, NO_DEFAULT
    if _head(annotation) in {"ClassVar", "KW_ONLY"}:
        return None
    if _head(annotation) == "InitVar" and isinstance(annotation, ast.Subscript):
        annotation = annotation.slice
    value = statement.value
    if isinstance(value, ast.Call) and _decorator_name(value) == "field":
        options = {keyword.arg: keyword.value for keyword in value.keywords}
        if "init" in options and _literal(options["init"]) is False:
            return None
        if "default" in options:
            default = _literal(options["default"])
        elif "default_factory" in options:
            default = UNKNOWN_DEFAULT
    elif value is not None:
        default = _literal(value)
    return Parameter(statement.target.id, annotation, module, default)


def _head(annotation: ast.expr) -> str:
    """Last name of an annotation, its brackets left out."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value.partition("[")[0].rpartition(".")[2]
    head = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return head.attr if isinstance(head, ast.Attribute) else getattr(head, "id", "")
