"""Checking a composed configuration against the signatures it names, all mistakes at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from helpsteer2.config.annotations import PARTIAL, TARGET, choices, fits
from helpsteer2.config.modules import NotFound
from helpsteer2.config.rules import RULES, Settings
from helpsteer2.config.signatures import (
    NO_DEFAULT,
    UNKNOWN_DEFAULT,
    Parameter,
    Signature,
    read_signature,
)

RESERVED = {TARGET, PARTIAL, "_args_", "_recursive_", "_convert_"}
"""Keys of a node that Hydra reads itself."""

PASSED_BY_CODE = {"config"}
"""Parameters of a command that no configuration sets: it gets the whole configuration there."""

MISSING = object()
"""Stands in the plain configuration for a value that is not there."""

_LONGEST_VALUE = 80


@dataclass(frozen=True)
class Mistake:
    """One thing wrong with a configuration.

    Attributes:
        path: Dotted path of the value, or the override as typed.
        message: What is wrong and how to mend it.
    """

    path: str
    message: str


def near_miss(word: str, candidates: Iterable[str]) -> str:
    """A half-sentence naming the candidates closest to a word; empty if none is close."""
    close = get_close_matches(word, sorted(set(candidates)), n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def plain(config: DictConfig) -> tuple[dict[str, Any], list[Mistake]]:
    """Resolve a configuration into plain containers.

    Args:
        config: The composed configuration, without Hydra's own node.

    Returns:
        The configuration as dicts and lists, ``MISSING`` where a value is not there, and a mistake
        for each such value.
    """
    mistakes: list[Mistake] = []
    container = _plain(config, "", mistakes)
    assert isinstance(container, dict)
    return container, mistakes


def _plain(node: Any, path: str, mistakes: list[Mistake]) -> Any:
    if not isinstance(node, DictConfig | ListConfig):
        return node
    if node._is_none():
        return None
    keys: Iterable[Any] = range(len(node)) if isinstance(node, ListConfig) else node.keys()
    items = {key: _value(node, key, _join(path, key), mistakes) for key in keys}
    return list(items.values()) if isinstance(node, ListConfig) else items


def _value(node: DictConfig | ListConfig, key: Any, path: str, mistakes: list[Mistake]) -> Any:
    """One value, resolved; a mistake and ``MISSING`` if that cannot be done."""
    if OmegaConf.is_missing(node, key):
        mistakes.append(Mistake(path, f"has no value yet: give {path}=…"))
        return MISSING
    try:
        return _plain(node[key], path, mistakes)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        mistakes.append(Mistake(path, f"cannot be resolved: {reason}"))
        return MISSING


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def validate(config: Mapping[str, Any], target: str) -> tuple[Settings, list[Mistake]]:
    """Hold a plain configuration against the command it is for.

    The root is bound to the command's signature, and every ``_target_`` node to its own.

    Args:
        config: The configuration as made by ``plain``.
        target: Dotted path of the command's function.

    Returns:
        The configuration with the defaults of every call filled in, and every mistake; none means
        that the command can be called.
    """
    checker = _Checker()
    settings = Settings(checker.call(config, target, ""), config)
    found = [Mistake(path, message) for rule in RULES for path, message in rule(settings)]
    # A rule that looks at a value of the wrong type knows why it is.
    told = {mistake.path for mistake in found}
    return settings, [*(m for m in checker.mistakes if m.path not in told), *found]


class _Checker:
    """Walks a configuration, collects mistakes, and fills in the defaults of every call."""

    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []

    def node(self, value: Any, path: str) -> Any:
        """Check whatever stands at a path; the value with defaults filled in."""
        if isinstance(value, dict):
            if TARGET in value:
                return self.target_node(value, path)
            return {key: self.node(item, _join(path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.node(item, _join(path, i)) for i, item in enumerate(value)]
        return None if value is MISSING else value

    def target_node(self, value: dict[str, Any], path: str) -> Any:
        target = value[TARGET]
        if not isinstance(target, str):
            self.mistakes.append(Mistake(_join(path, TARGET), "has to be a dotted name"))
            return value
        arguments = {key: item for key, item in value.items() if key not in RESERVED}
        complete = not value.get(PARTIAL) and not value.get("_args_")
        filled = self.call(arguments, target, path, complete=complete)
        return {**filled, TARGET: target}

    def call(
        self, arguments: Mapping[str, Any], target: str, path: str, complete: bool = True
    ) -> dict[str, Any]:
        """Bind arguments to a signature.

        Args:
            arguments: Values by name.
            target: What will be called.
            path: Where the arguments stand; empty for the root.
            complete: Whether arguments without a default have to be there.

        Returns:
            The good arguments, and the defaults of those left out.
        """
        filled = {key: self.node(value, _join(path, key)) for key, value in arguments.items()}
        try:
            signature = read_signature(target)
        except NotFound as error:
            close = near_miss(target.rpartition(".")[2], error.candidates)
            self.mistakes.append(Mistake(_join(path, TARGET), f"{target}: {error}{close}"))
            return filled
        if signature is None:
            return filled
        for key, value in arguments.items():
            if not self.argument(key, value, signature, target, path):
                filled[key] = None
        for name, parameter in signature.parameters.items():
            if name in arguments or (not path and name in PASSED_BY_CODE):
                continue
            if parameter.default is not NO_DEFAULT:
                filled[name] = None if parameter.default is UNKNOWN_DEFAULT else parameter.default
            elif complete:
                message = f"is missing: {_owner(target, path)} needs it"
                self.mistakes.append(Mistake(_join(path, name), message))
        return filled

    def argument(self, key: str, value: Any, signature: Signature, target: str, path: str) -> bool:
        """Whether one argument is known and of the right type."""
        parameter = signature.parameters.get(key)
        if parameter is None or (not path and key in PASSED_BY_CODE):
            if signature.accepts_any_keyword:
                return True
            names = set(signature.parameters) - (PASSED_BY_CODE if not path else set())
            message = f"is unknown to {_owner(target, path)}{near_miss(key, names)}"
            self.mistakes.append(Mistake(_join(path, key), message))
            return False
        if _has_missing(value) or fits(value, parameter.annotation, parameter.module):
            return True
        for place, item, wanted in _unfit(_join(path, key), value, parameter):
            self.mistakes.append(Mistake(place, _type_message(place, item, wanted)))
        return False


def _owner(target: str, path: str) -> str:
    return target if path else f"`helpsteer2 {target.rpartition('.')[2]}`"


def _has_missing(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_missing(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_missing(item) for item in value)
    return value is MISSING


def _unfit(path: str, value: Any, parameter: Parameter) -> list[tuple[str, Any, Parameter]]:
    """The values of a mapping that do not fit, or else all of it, each with what it has to be."""
    assert parameter.annotation is not None
    members = choices(parameter.annotation, parameter.module)
    inner = next((member.value for member in members if member.value is not None), None)
    if inner is None or not isinstance(value, dict) or TARGET in value:
        return [(path, value, parameter)]
    items = [
        (_join(path, key), item, replace(parameter, annotation=inner))
        for key, item in value.items()
        if not fits(item, inner, parameter.module)
    ]
    return items or [(path, value, parameter)]


def _type_message(path: str, value: Any, parameter: Parameter) -> str:
    """What was expected, what came, and what was probably meant."""
    assert parameter.annotation is not None
    members = list(choices(parameter.annotation, parameter.module))
    labels = list(dict.fromkeys(member.label for member in members))
    shown = repr(value) if not isinstance(value, dict) else str(value.get(TARGET, value))
    if len(shown) > _LONGEST_VALUE:
        shown = f"{shown[:_LONGEST_VALUE]}…"
    message = f"expected {' | '.join(labels)}, got {shown}"
    if isinstance(value, int | float | bool) and "str" in labels:
        return f"{message}; text needs quotes of its own: {path}=\"'{value}'\""
    return f"{message}{_type_hint(value, labels, [m.literal for m in members])}"


def _type_hint(value: Any, labels: Sequence[str], literals: Sequence[Any]) -> str:
    if isinstance(value, str):
        if value in {"None", "none", "NULL"} and "None" in labels:
            return "; did you mean null?"
        if _is_number(value) and {"int", "float"} & set(labels):
            return "; write the number without quotes"
        return near_miss(value, [item for item in literals if isinstance(item, str)])
    if isinstance(value, float) and "int" in labels and value.is_integer():
        return f"; did you mean {int(value)}?"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
