"""From the turns of all contenders to figures and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from experiments.benchmarks.reward_step.summary import spread

OURS = "ours"
UPDATE = "update"
PHASES = ("sampling", "scoring", "logprobs", "values", UPDATE)

Turns = Sequence[Mapping[str, Any]]


def summarise(turns: Mapping[str, Turns]) -> dict[str, dict[str, Any]]:
    """Figures of every contender over the measured rounds.

    Args:
        turns: Of each contender, what it reported in each round.

    Returns:
        Of each contender its speeds, its phases (median seconds; the update is what no other phase
        took: advantages, training passes, optimizer), the share of responses that ended before the
        limit, and ``ours_is_faster``, how many times as many samples a second ours made:
        ``per_round`` within each round, ``medians`` and ``total`` as ratios over all of them.

    Raises:
        ValueError: If the contenders did not make the same number of samples.
    """
    if len({turn["samples"] for own in turns.values() for turn in own}) != 1:
        raise ValueError("the contenders made different numbers of samples")
    return {name: _figures(own, turns.get(OURS)) for name, own in turns.items()}


def _figures(turns: Turns, ours: Turns | None) -> dict[str, Any]:
    seconds, samples = _column(turns, "seconds"), _column(turns, "samples")
    tokens = _column(turns, "completion_tokens")
    figures: dict[str, Any] = {
        "samples_per_second": spread(samples / seconds),
        "completion_tokens_per_second": spread(tokens / seconds),
        "completion_tokens_per_sample": float(tokens.sum() / samples.sum()),
        "ended_share": float(_column(turns, "ended").sum() / samples.sum()),
        "phase_seconds": _phases(turns),
        "peak_mib": max(turn["peak_mib"] for turn in turns),
        "rounds": {
            name: [turn[name] for turn in turns] for name in ("seconds", "completion_tokens")
        },
    }
    if ours is not None:
        our_seconds = _column(ours, "seconds")
        figures["ours_is_faster"] = {
            "per_round": spread(seconds / our_seconds),
            "medians": float(np.median(seconds) / np.median(our_seconds)),
            "total": float(seconds.sum() / our_seconds.sum()),
        }
    return figures


def _phases(turns: Turns) -> dict[str, float]:
    """Median seconds of each phase; what no phase counted is the update."""
    found = {
        phase: np.array([turn["phases"].get(phase, 0.0) for turn in turns])
        for phase in PHASES
        if phase != UPDATE
    }
    found[UPDATE] = _column(turns, "seconds") - sum(found.values())
    return {phase: float(np.median(values)) for phase, values in found.items()}


def _column(turns: Turns, key: str) -> np.ndarray:
    return np.array([turn[key] for turn in turns], dtype=np.float64)


def best_peer(figures: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Which of TRL's settings made the most samples a second, by its median."""
    speeds = {
        name: own["samples_per_second"]["median"] for name, own in figures.items() if name != OURS
    }
    return max(speeds, key=speeds.__getitem__, default=None)


def table(case: Mapping[str, Any]) -> Table:
    """The figures of a case for the terminal."""
    result = Table(
        title=f"{case['kind']} {case['size']}: {case['prompts']} prompts × {case['samples']}, "
        f"{case['rounds']} rounds",
        caption="medians; ours is faster: per round \\[quartiles] / ratio of total times",
    )
    result.add_column("")
    for column in ("samples/s", "tokens/s", *PHASES, "peak MiB", "ours is faster"):
        result.add_column(column, justify="right", no_wrap=True)
    for name, own in case["contenders"].items():
        faster = ""
        if "ours_is_faster" in own:
            ratio = own["ours_is_faster"]["per_round"]
            faster = f"{ratio['median']:.2f}× [{ratio['q1']:.2f}–{ratio['q3']:.2f}] / "
            faster += f"{own['ours_is_faster']['total']:.2f}×"
        result.add_row(
            name,
            f"{own['samples_per_second']['median']:.2f}",
            f"{own['completion_tokens_per_second']['median']:,.0f}",
            *(f"{own['phase_seconds'][phase]:.1f}s" for phase in PHASES),
            f"{own['peak_mib']:,.0f}",
            faster,
        )
    return result
