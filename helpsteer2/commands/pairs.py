"""``helpsteer2 pairs``: preference pairs from rated, compared or scored groups."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from rich.console import Console
from rich.table import Table

from helpsteer2.attributes import AttributeWeights
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.commands.splits import write_splits
from helpsteer2.data.groups import Group, GroupSource, read_all
from helpsteer2.data.pairing import By, PairCounts, Pairing
from helpsteer2.errors import UserError
from helpsteer2.evaluation.report import named_table
from helpsteer2.records import environment

MEANINGS = {
    "groups": "groups read",
    "pairs": "pairs",
    "ties": "ties: all responses are worth the same",
    "below_min_gap": "difference below min_gap",
    "one_response": "fewer than two different responses",
    "unknown": "ratings, scores or preference missing",
    "duplicate_texts": "responses dropped: the same text again",
}
"""What is counted, in words."""


def pairs(
    run_dir: str,
    data: GroupSource,
    splits: Sequence[str],
    by: By,
    weights: AttributeWeights,
    min_gap: float,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write the best and the worst response of each group, a file a split.

    By helpfulness ratings, HelpSteer2's train split has 7,221 pairs according to arXiv 2406.08673,
    section 4.3.

    Args:
        run_dir: Folder of the pairs (``train.jsonl``, ``validation.jsonl``), which is data for
            ``data=groups``, and of the record (``result.json``).
        data: Groups of n responses.
        splits: The splits of them to read.
        by: ``ratings``, ``scores`` (made by ``helpsteer2 annotate``) or ``preference``.
        weights: Weighting that makes one reward of ratings or scores; a single score is one.
        min_gap: Smallest difference of the two rewards; by preference, the smallest strength.
        config: The whole configuration, kept in the result.

    Raises:
        DataError: If a row of the data is bad.
        UserError: If no pair is left of a split, the weighting does not fit the data, another
            process uses the folder, or it cannot be written. Pairs of an earlier run stay then.
    """
    started, start = datetime.now(timezone.utc), time.monotonic()
    if not splits:
        raise UserError("splits is empty: name at least one, splits=[train] for example")
    folder = RunFolder(run_dir)
    counts = {split: PairCounts() for split in splits}
    pairing = Pairing(by, weights, min_gap)

    def made(split: str) -> Iterator[Group]:
        of = counts[split]
        yield from pairing.pairs(read_all(data, split), data.attribute_names, of)
        if not of.pairs:
            raise UserError(f"no pair is left of the split {split!r}: {_told(of)}")

    with folder.locked("pairs"):
        write_splits(folder.path, {split: made(split) for split in splits}, data.attribute_names)
        folder.write_result(
            {
                "kind": "pairs",
                "metrics": {split: asdict(of) for split, of in counts.items()},
                "fingerprints": {split: data.fingerprint(split) for split in splits},
                "config": config,
                "environment": environment(),
                "started": started.isoformat(timespec="seconds"),
                "wall_seconds": round(time.monotonic() - start, 3),
            }
        )
    console = Console()
    for split, of in counts.items():
        console.print(counts_table(of, f"pairs of {split!r} by {by}"))
    names = ", ".join(f"{split}.jsonl" for split in splits)
    console.print(f"wrote {names} in {folder.path}", soft_wrap=True)


def counts_table(counts: PairCounts, title: str) -> Table:
    """A row for everything that was counted, but for what never happened.

    Args:
        counts: What became of the groups.
        title: Stands above.
    """
    table = named_table(title, ["", "number", "% of groups"])
    for name, number in asdict(counts).items():
        if number or name in ("groups", "pairs"):
            share = "" if name == "duplicate_texts" else f"{number / counts.groups:.1%}"
            table.add_row(MEANINGS[name], f"{number:,}", share)
    return table


def _told(counts: PairCounts) -> str:
    """Why there is no pair, on one line."""
    found = {name: number for name, number in asdict(counts).items() if number}
    return ", ".join(f"{number:,} {MEANINGS[name]}" for name, number in found.items())
