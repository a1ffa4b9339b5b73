"""The command line: ``helpsteer2 COMMAND``, also ``python -m helpsteer2 COMMAND``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import helpsteer2
from helpsteer2.commands import CONFIG_COMMANDS, OTHER_COMMANDS
from helpsteer2.errors import UserError

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""

BROKEN_PIPE = 141
"""Exit code when the reader of our output goes away: 128 + SIGPIPE."""


def usage() -> str:
    """The text of ``helpsteer2 --help``."""
    summaries = {name: command.summary for name, command in CONFIG_COMMANDS.items()}
    summaries.update(OTHER_COMMANDS)
    width = max(map(len, summaries)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in summaries.items()]
    return "\n".join(
        [
            "usage: helpsteer2 COMMAND [...]",
            "",
            *lines,
            "",
            f"{', '.join(CONFIG_COMMANDS)} and check take Hydra overrides:",
            "key=value, -m, --cfg job, --info.",
            "`helpsteer2 COMMAND --help` says more; "
            'eval "$(helpsteer2 -sc install=bash)" completes in the shell.',
        ]
    )


def dispatch(argv: Sequence[str]) -> int:
    """Run the command that the arguments name.

    Args:
        argv: Arguments without the program's name.

    Returns:
        The exit code.

    Raises:
        UserError: If there is no such command, or as the command raises it.
    """
    if not argv or argv[0] in {"-h", "--help"}:
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"helpsteer2 {helpsteer2.__version__}")
        return 0
    name, rest = argv[0], list(argv[1:])
    if name in {"-sc", "--shell-completion"}:
        module = import_module("helpsteer2.commands.completion")
        return int(module.main(rest))
    if name in CONFIG_COMMANDS:
        launch = import_module("helpsteer2.commands.launch")
        return int(launch.launch(CONFIG_COMMANDS[name], rest))
    if name in OTHER_COMMANDS:
        return int(import_module(f"helpsteer2.commands.{name}").main(rest))
    print(f"helpsteer2: no command {name!r}\n\n{usage()}", file=sys.stderr)
    return 2


def main() -> int:
    """Entry point: errors a user can mend are printed without a traceback."""
    try:
        return dispatch(sys.argv[1:])
    except UserError as error:
        print(f"helpsteer2: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("helpsteer2: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
