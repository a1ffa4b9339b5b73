"""What a pipeline is made of: stages, their overrides, and what they read of one another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from helpsteer2.errors import ConfigError
from helpsteer2.records import flat

OUTPUTS = ("export", "exports", "groups.jsonl", "reference", "statistics.json", "train.jsonl")
"""Files and folders of a run that another stage may read; all else is of the run alone.

``result.json`` is not among them: it has times in it, so whatever read it would be stale as soon as
the stage is repeated.
"""

CHOOSE = "choose"
"""Key of a stage's settings that holds choices of config groups, beside the values."""

_PLAIN_TEXT = re.compile(r"[A-Za-z_/][\w./-]*")
_WORDS = {"null", "true", "false", "nan", "inf"}


@dataclass(frozen=True)
class Output:
    """Something that an earlier stage leaves in its folder.

    Attributes:
        stage: Name of the stage.
        path: One of ``OUTPUTS``, or a path below one.
    """

    stage: str
    path: str


@dataclass(frozen=True)
class Stage:
    """One run of one command.

    Attributes:
        name: Unique within the pipeline; the stage's folder begins with it.
        command: Name of a command that takes a configuration.
        overrides: Its overrides by dotted key (or config group). A value may be an ``Output``, or a
            list with some in it.
    """

    name: str
    command: str
    overrides: Mapping[str, Any]

    def reads(self) -> tuple[Output, ...]:
        """The outputs of earlier stages that it reads, each once."""
        values = (
            item
            for value in self.overrides.values()
            for item in (value if isinstance(value, list) else [value])
        )
        return tuple(dict.fromkeys(item for item in values if isinstance(item, Output)))


class Pipeline(Protocol):
    """A recipe."""

    def stages(self, seed: int) -> Sequence[Stage]:
        """The stages in the order in which they run; what is random in them follows the seed."""
        ...


def overrides_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the settings of a stage, as a YAML file holds them, into overrides.

    Args:
        settings: Nested values by key. ``choose`` holds choices of config groups; a text
            ``@STAGE/PATH`` stands for an output of an earlier stage.

    Returns:
        Values by dotted key.
    """
    values = {key: value for key, value in settings.items() if key != CHOOSE}
    by_key = {**(settings.get(CHOOSE) or {}), **dict(flat(values))}
    return {key: _referred(value) for key, value in by_key.items()}


def _referred(value: Any) -> Any:
    """A value with its references to other stages made objects."""
    if isinstance(value, list):
        return [_referred(item) for item in value]
    if isinstance(value, str) and value.startswith("@"):
        stage, _, path = value[1:].partition("/")
        return Output(stage, path)
    return value


def override_text(key: str, value: Any) -> str:
    """Write one override as Hydra's grammar wants it.

    Args:
        key: Dotted key or config group.
        value: Plain data without ``Output``.
    """
    return f"{key}={_value_text(value)}"


def _value_text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(_value_text(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_value_text(item)}' for key, item in value.items())}}}"
    text = str(value)
    if _PLAIN_TEXT.fullmatch(text) and text.lower() not in _WORDS:
        return text
    # A backslash escapes a quote and, before one, itself; anywhere else it is a letter.
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'")
    return f"'{escaped}'"


def check_order(stages: Sequence[Stage], commands: Mapping[str, Any]) -> list[str]:
    """What is wrong with the stages themselves, before their configurations are looked at.

    Args:
        stages: In the order in which they shall run.
        commands: The commands that there are, by name.

    Returns:
        One line a mistake.
    """
    mistakes: list[str] = []
    seen: set[str] = set()
    for stage in stages:
        if stage.command not in commands:
            mistakes.append(f"stage {stage.name}: there is no command {stage.command!r}")
        for output in stage.reads():
            if output.stage not in seen:
                mistakes.append(f"stage {stage.name}: no earlier stage is named {output.stage!r}")
            if output.path.partition("/")[0] not in OUTPUTS:
                kinds = ", ".join(OUTPUTS)
                mistakes.append(
                    f"stage {stage.name}: {output.path!r} is no output of a stage: {kinds}"
                )
        if stage.name in seen:
            mistakes.append(f"two stages are named {stage.name!r}")
        seen.add(stage.name)
    return mistakes


def require_one_source(name: str, folder: str | None, settings: Any, stage: str) -> None:
    """A model is either given or trained by the pipeline.

    Args:
        name: Key of the folder.
        folder: Its value.
        settings: Settings of the stage that would train it.
        stage: Key of those.

    Raises:
        ConfigError: If both or neither is given.
    """
    if (folder is None) == (settings is None):
        raise ConfigError(
            f"pipeline.{name}: give either a folder here, or the settings of the training that "
            f"makes it in pipeline.{stage}"
        )
