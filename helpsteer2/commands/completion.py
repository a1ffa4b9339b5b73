"""Shell completion: command names at the first word, then Hydra's own under a command."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Sequence

from helpsteer2.commands import CONFIG_COMMANDS, OTHER_COMMANDS
from helpsteer2.errors import UserError

_SECOND_WORD = re.compile(r"^(\s*\S+)\s+\S+")


def main(arguments: Sequence[str]) -> int:
    """Answer ``-sc query=SHELL``, ``-sc install=SHELL`` and ``-sc uninstall=SHELL``.

    The shell's line is read from ``COMP_LINE``, as Hydra's plugins do.

    Args:
        arguments: What follows ``-sc``.

    Returns:
        The exit code.

    Raises:
        UserError: If it is asked for anything else.
    """
    if not arguments or arguments[0].partition("=")[0] not in {"query", "install", "uninstall"}:
        raise UserError("-sc takes install=bash, install=fish or install=zsh (or uninstall=…)")
    if not arguments[0].startswith("query="):
        _ask_hydra("train", arguments)
        return 0
    words = _words()
    if len(words) <= 2:
        candidates = [*CONFIG_COMMANDS, *OTHER_COMMANDS]
    else:
        drop_command_word()
        candidates = _candidates(words[1], arguments)
    last = words[-1] if len(words) > 1 else ""
    print(" ".join(candidate for candidate in candidates if candidate.startswith(last)))
    return 0


def _candidates(name: str, arguments: Sequence[str]) -> list[str]:
    """What may follow a command; the line no longer holds the command's name."""
    if name == "data":
        return ["describe", "validate"] if len(_words()) == 2 else []
    if name != "check":
        return _overrides(name, arguments)
    words, names = _words(), []
    if len(words) == 2:
        names = list(CONFIG_COMMANDS)
    elif words[1] in CONFIG_COMMANDS:
        drop_command_word()
        return _overrides(words[1], arguments)
    return names + _overrides("train", arguments)


def _overrides(name: str, arguments: Sequence[str]) -> list[str]:
    """Hydra's completions, and the options in sub-folders of a group, which it leaves out."""
    if name not in CONFIG_COMMANDS:
        return []
    from helpsteer2.config.compose import conf_dir

    answer = io.StringIO()
    with contextlib.redirect_stdout(answer):
        _ask_hydra(name, arguments)
    # Hydra takes the sub-folders of a group for groups of their own.
    found = [
        f"{word[:-1]}=" if word == "experiment/" else word for word in answer.getvalue().split()
    ]
    group, equals, _ = _words()[-1].partition("=")
    folder = conf_dir() / group
    if equals and group and folder.is_dir():
        nested = (path.relative_to(folder).with_suffix("") for path in folder.glob("*/**/*.yaml"))
        found += sorted(f"{group}={path.as_posix()}" for path in nested)
    return found


def drop_command_word() -> None:
    """Take the command's name out of the line that the shell completes, for Hydra's plugin."""
    line = os.environ.get("COMP_LINE", "")
    shorter = _SECOND_WORD.sub(r"\1", line)
    os.environ["COMP_LINE"] = shorter
    point = int(os.environ.get("COMP_POINT") or len(line))
    os.environ["COMP_POINT"] = str(max(point - (len(line) - len(shorter)), 0))


def _words() -> list[str]:
    """Words of the line so far, an empty one last if a new word begins."""
    line = os.environ.get("COMP_LINE", "")
    return [*line.split(), ""] if line.endswith(" ") else line.split()


def _ask_hydra(name: str, arguments: Sequence[str]) -> None:
    from helpsteer2.commands.launch import launch

    launch(CONFIG_COMMANDS[name], ["-sc", *arguments])
