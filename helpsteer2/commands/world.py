"""``helpsteer2 world write|rate``: the made-up world as files, and its oracle."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.commands.score import parse_line, row_group
from helpsteer2.errors import UserError
from helpsteer2.world.files import write_tables
from helpsteer2.world.oracle import rate
from helpsteer2.world.source import WorldSource

RATE_HELP = """\
Read rows of {"prompt": ..., "response": ...} on standard input, one JSON object a line, and write
the same rows with "ratings" to standard output: what the oracle of the made-up world gives each of
the five attributes, 0 to 4. The response can be any text, the prompt has to be one of the world.

"prompt" is a string (HelpSteer2's multi-turn <extra_id_1> form too) or a list of chat messages.
Other keys are kept; "ratings" of the input are replaced.

A bad row stops nothing: it comes back with an "error" in place of ratings, its line number and what
is wrong are told on standard error, and the exit code is 1.
"""


def main(argv: list[str]) -> int:
    """Run ``world write`` or ``world rate``.

    Args:
        argv: Arguments behind ``helpsteer2 world``.

    Returns:
        0, 1 if any row to rate was bad, 141 if the reader of the output went away.

    Raises:
        UserError: If a number makes no sense or a file cannot be written.
    """
    options = _parser().parse_args(argv)
    if options.command == "rate":
        return rate_standard_input()
    source = WorldSource(options.groups, options.seed, options.validation_groups)
    for path in write_tables(source, options.folder):
        print(path)
    return 0


def rate_standard_input() -> int:
    """Rate the rows on standard input.

    Returns:
        0, 1 if any row was bad, 141 if the reader of the output went away.
    """
    bad = 0
    try:
        for number, line in enumerate(sys.stdin.buffer, 1):
            if not line.strip():
                continue
            row = _rated(line, number)
            bad += "error" in row
            text = json.dumps(row, ensure_ascii=False) + "\n"
            # A lone surrogate of the input goes back as the escape it came as.
            sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        # Python would complain once more while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 1 if bad else 0


def _rated(line: bytes, number: int) -> dict[str, Any]:
    """A row as it goes back."""
    content: dict[str, Any] = {}
    try:
        content = parse_line(line)
        group = row_group(content, number)
        ratings = rate(group.prompt, group.responses[0])
    except UserError as error:
        print(f"stdin:{number}: {error}", file=sys.stderr)
        kept = {key: value for key, value in content.items() if key not in ("ratings", "error")}
        return {**(kept or {"line": number}), "error": str(error)}
    kept = {key: value for key, value in content.items() if key != "error"}
    return {**kept, "ratings": dict(zip(HELPSTEER2_ATTRIBUTES, ratings, strict=True))}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="helpsteer2 world", description="The made-up world: its files and its oracle."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="write|rate")
    text = "write the three tables of HelpSteer2 with made-up rows"
    write = commands.add_parser("write", help=text, description=text)
    write.add_argument("folder", metavar="DIR", help="where to; files there are replaced")
    write.add_argument("--groups", type=int, required=True, metavar="N", help="training pairs")
    write.add_argument(
        "--validation-groups", type=int, default=256, metavar="N", help="validation pairs (256)"
    )
    write.add_argument("--seed", type=int, default=0, metavar="S", help="(0)")
    commands.add_parser(
        "rate",
        help="rate rows of prompt and response on standard input by the oracle",
        description=RATE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
