"""``helpsteer2 score``: JSONL in, the same rows with scores out, while the input is still open."""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helpsteer2.attributes import AttributeWeights
from helpsteer2.data.checks import RowCheck, shown
from helpsteer2.data.groups import Group, Message
from helpsteer2.data.rows import Row
from helpsteer2.data.sources.base import MAX_CHARACTERS
from helpsteer2.data.sources.group_rows import messages
from helpsteer2.data.sources.helpsteer import parse_turns
from helpsteer2.errors import Problem, UserError

if TYPE_CHECKING:
    from helpsteer2.data.tokens import TokenGroup
    from helpsteer2.rewards.scorer import RewardScorer, Scores

WINDOW_ROWS, WINDOW_BYTES = 256, 8_000_000
"""At most so much input is read before it is scored."""

LINGER_SECONDS = 0.05
"""How long a window waits for more input before it is scored as it is."""

HELP = """\
Read rows of {"prompt": ..., "response": ...} on standard input, one JSON object a line, and write
the same rows with "scores" (an object by attribute name) and "score" (their weighted sum, or the
score of a model with one output) to standard output, in order and as soon as they are scored.

"prompt" is a string (HelpSteer2's multi-turn <extra_id_1> form too) or a list of chat messages that
ends with one of the user. Other keys are kept; "scores" and "score" of the input are replaced, and
an "error" of it is left out.

A bad row stops nothing: it comes back with an "error" in place of scores, its line number and what
is wrong are told on standard error, and the exit code is 1.
"""


def main(argv: list[str]) -> int:
    """Score standard input to standard output.

    Args:
        argv: Arguments behind ``helpsteer2 score``.

    Returns:
        0, 1 if any row was bad, 141 if the reader of the output went away.

    Raises:
        UserError: If the model or the weighting cannot be used.
    """
    options = _parser().parse_args(argv)
    from helpsteer2.rewards.scorer import RewardScorer

    weights = None if options.weights is None else load_weights(options.weights)
    scorer = RewardScorer.from_pretrained(
        options.model,
        dtype=options.dtype,
        attention=options.attention,
        tokens_per_microbatch=options.batch_tokens,
    )
    run = _Scoring(scorer, _weights_for(scorer, weights))
    try:
        for window in _windows(sys.stdin.fileno()):
            for row in run.rows(window):
                text = json.dumps(row, ensure_ascii=False) + "\n"
                # A lone surrogate of the input goes back as the escape it came as.
                sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
                sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else Python flushes at exit
        return 141
    run.summary()
    return 1 if run.n_bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "helpsteer2 score", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which reward model scores, and how."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="an export, or any decoder sequence classifier (a folder or a Hub id)",
    )
    parser.add_argument(
        "--weights",
        metavar="NAME|JSON",
        help="a weighting of conf/weights, or an object like '{\"helpfulness\": 1}' "
        "(default: the model's own)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attention", choices=("auto", "sdpa", "flex", "flash"), default="auto")
    parser.add_argument(
        "--batch-tokens",
        type=whole_number,
        default=8192,
        metavar="N",
        help="tokens of one forward pass (default: %(default)s)",
    )


def whole_number(text: str) -> int:
    """A number of an option that has to be 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"has to be 1 or more, got {number}")
    return number


def load_weights(text: str) -> AttributeWeights:
    """Read a weighting.

    Args:
        text: Name of a file in ``conf/weights``, or a JSON object of weights by attribute name.

    Raises:
        UserError: If there is no such weighting or its values are no numbers.
    """
    if text.lstrip().startswith("{"):
        try:
            return _weighting("custom", json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(f"--weights is not valid JSON: {error}") from error
    import yaml

    from helpsteer2.config.compose import conf_dir

    folder = conf_dir() / "weights"
    path = folder / f"{text}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise UserError(
            f"--weights: no weighting {text!r}; there are {names}, or give a JSON object"
        )
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return _weighting(content["name"], content["values"])


def _weighting(name: str, values: dict[str, Any]) -> AttributeWeights:
    bad = [k for k, v in values.items() if isinstance(v, bool) or not isinstance(v, int | float)]
    if bad:
        raise UserError(f"--weights: the weights of {', '.join(bad)} are not numbers")
    return AttributeWeights(name, values)


def _weights_for(scorer: RewardScorer, weights: AttributeWeights | None) -> list[float]:
    """Weight of each output of the model."""
    names = scorer.attribute_names
    weights = weights or scorer.model.spec.weights
    if weights is not None:
        return weights.vector(names)
    if len(names) == 1:
        return [1.0]
    raise UserError(
        f"the model has no weighting of its own for {', '.join(names)}: give one with --weights"
    )


def _windows(descriptor: int) -> Iterator[list[bytes]]:
    """Lines of a file descriptor in bounded windows; a short one as soon as the input pauses.

    No reader thread: one that is blocked on standard input would keep the process from ending.
    """
    window: list[bytes] = []
    partial = bytearray()
    size = 0
    while True:
        if window and not select.select([descriptor], [], [], LINGER_SECONDS)[0]:
            yield window
            window, size = [], 0
        chunk = os.read(descriptor, 1 << 16)
        partial += chunk
        if b"\n" in chunk or not chunk:
            lines = bytes(partial).split(b"\n")
            partial = bytearray(lines.pop() if chunk else b"")
            window += lines
        size += len(chunk)
        if window and (not chunk or len(window) >= WINDOW_ROWS or size >= WINDOW_BYTES):
            yield window
            window, size = [], 0
        if not chunk:
            return


@dataclass
class _Row:
    """A line of the input: what goes back, and either ids or what is wrong."""

    line: int
    content: dict[str, Any]
    tokens: TokenGroup | None = None
    error: str | None = None


class _Scoring:
    """Lines to rows, with a count of what was good and bad."""

    def __init__(self, scorer: RewardScorer, weights: list[float]) -> None:
        self._scorer = scorer
        self._weights = weights
        self._n_lines = 0
        self.n_good = 0
        self.n_bad = 0

    def rows(self, lines: list[bytes]) -> Iterator[dict[str, Any]]:
        """The rows to write for some lines, each as soon as it is scored."""
        parsed = []
        for line in lines:
            self._n_lines += 1
            if line.strip():
                parsed.append(self._parse(line))
        scores = self._scorer.score_encoded(row.tokens for row in parsed if row.tokens is not None)
        for row in parsed:
            yield self._scored(row, next(scores)) if row.tokens is not None else self._bad(row)

    def summary(self) -> None:
        """Say on standard error what happened."""
        cut = ", ".join(
            f"{n} {what.replace('_', ' ')}" for what, n in self._scorer.cuts.counts().items() if n
        )
        good = "1 row" if self.n_good == 1 else f"{self.n_good} rows"
        bad = "1 bad row has" if self.n_bad == 1 else f"{self.n_bad} bad rows have"
        print(
            f"scored {good}" + (f"; {cut}" if cut else "")
            + (f"; {bad} an error instead" if self.n_bad else ""),
            file=sys.stderr,
        )  # fmt: skip

    def _parse(self, line: bytes) -> _Row:
        row = _Row(self._n_lines, {})
        try:
            row.content = parse_line(line)
            row.tokens = self._scorer.encode(row_group(row.content, row.line), row.line)
        except UserError as error:
            row.error = str(error)
        return row

    def _scored(self, row: _Row, scores: Scores) -> dict[str, Any]:
        values = [float(value) for value in scores[0]]
        reward = sum(w * value for w, value in zip(self._weights, values, strict=True) if w)
        if not all(math.isfinite(value) for value in (*values, reward)):
            row.error = f"not finite: the scores {values} or their weighted sum {reward}"
            return self._bad(row)
        self.n_good += 1
        names = self._scorer.attribute_names
        kept = {key: value for key, value in row.content.items() if key != "error"}
        return {**kept, "scores": dict(zip(names, values, strict=True)), "score": reward}

    def _bad(self, row: _Row) -> dict[str, Any]:
        self.n_bad += 1
        print(f"stdin:{row.line}: {row.error}", file=sys.stderr)
        kept = {key: value for key, value in row.content.items() if key not in ("scores", "score")}
        return {**kept, "error": row.error} if kept else {"line": row.line, "error": row.error}


def parse_line(line: bytes) -> dict[str, Any]:
    """Read a line of the input as a JSON object.

    Args:
        line: The line, with or without its end.

    Raises:
        UserError: If it is none.
    """
    try:
        text = line.decode("utf-8")
        content = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise UserError(f"not valid UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"expected a JSON object, got {shown(content)}")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """A number; ``1e999`` would be written back as ``Infinity``."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def row_group(content: dict[str, Any], line: int) -> Group:
    """A row as a prompt with one response.

    Args:
        content: Its columns.
        line: Its line in the input.

    Raises:
        UserError: With everything that is wrong with the row.
    """
    problems: list[Problem] = []
    check = RowCheck(Row("stdin", line, content), problems.append, MAX_CHARACTERS)
    prompt, response = _prompt(check), check.text("response")
    if problems or response is None:
        raise UserError("; ".join(f"{problem.field}: {problem.message}" for problem in problems))
    return Group(str(line), f"stdin:{line}", prompt, (response,))


def _prompt(check: RowCheck) -> tuple[Message, ...]:
    """Chat messages from a string or a list of messages."""
    if isinstance((check.row.values or {}).get("prompt"), list):
        return messages(check)
    text = check.text("prompt")
    turns = () if text is None else parse_turns(text)
    if turns and turns[-1]["role"] != "user":
        check.fail("prompt", "must end in a turn of the user, it ends in one of the assistant")
    elif turns and not turns[-1]["content"].strip():
        check.fail("prompt", "the last turn of the user is empty")
    return turns
