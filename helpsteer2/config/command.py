"""What a command that takes a configuration is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ConfigCommand:
    """A command that is a function whose parameters are the keys of its configuration.

    Attributes:
        name: As typed.
        summary: One line for the help.
        target: Dotted path of the function.
        config_name: Name of its root file in ``conf``.
        flags: Flags that may be typed in place of an override, and that override.
    """

    name: str
    summary: str
    target: str
    config_name: str
    flags: Mapping[str, str] = field(default_factory=dict)
