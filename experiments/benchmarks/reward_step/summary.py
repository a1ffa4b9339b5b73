"""From the turns of all contenders to figures and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

Turn = Mapping[str, Any]
RATES = ("square", "layers")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "q1": low, "q3": high}


def summarise(
    turns: Mapping[str, Sequence[Turn]], rates: Sequence[Turn], ours: str
) -> dict[str, dict[str, Any]]:
    """Figures of every contender over the measured rounds.

    A ratio says how many times as fast ours is. ``same_groups`` compares the time for all groups of
    the run, which are the same for everyone. ``per_round`` is the median over rounds of the ratio
    of real tokens a second; where both had the same groups in every round, that is the ratio of
    groups a second too.

    Args:
        turns: Of each contender, what it reported in each round.
        rates: The matmul rates of each round.
        ours: Name of the contender that the others are compared with.

    Returns:
        Of each contender its figures; time per round in ``seconds``.

    Raises:
        ValueError: If the contenders did not have the same groups.
    """
    totals = {int(_column(own, "real_tokens").sum()) for own in turns.values()}
    if len(totals) > 1:
        raise ValueError(f"the contenders read different groups: {sorted(totals)} tokens")
    return {name: _figures(own, turns[ours], rates) for name, own in turns.items()}


def _figures(turns: Sequence[Turn], ours: Sequence[Turn], rates: Sequence[Turn]) -> dict[str, Any]:
    seconds = _column(turns, "seconds")
    total = float(seconds.sum())
    speed = {
        f"{what}_per_second": {
            "over_all": float(_column(turns, key).sum()) / total,
            **spread((_column(turns, key) / seconds).tolist()),
        }
        for what, key in (
            ("groups", "groups"),
            ("real_tokens", "real_tokens"),
            ("executed_tokens", "executed_tokens"),
            ("model_flops", "model_flops"),
            ("executed_flops", "executed_flops"),
        )
    }
    own_speed = _column(turns, "real_tokens") / seconds
    our_seconds = _column(ours, "seconds")
    our_speed = _column(ours, "real_tokens") / our_seconds
    return {
        **speed,
        "share_of_matmul_rate": {
            rate: spread((_column(turns, "model_flops") / seconds / _column(rates, rate)).tolist())
            for rate in RATES
        },
        "padding_share": _padding(turns),
        "peak_mib": max(turn["peak_mib"] for turn in turns),
        "ours_is_faster": {
            "same_groups": total / float(our_seconds.sum()),
            "per_round": spread((our_speed / own_speed).tolist()),
        },
        "seconds": seconds.tolist(),
        "real_tokens": [turn["real_tokens"] for turn in turns],
        "micro_batches": [turn["rows"] for turn in turns],
    }


def _padding(turns: Sequence[Turn]) -> float:
    """Share of executed tokens that are padding."""
    real, executed = _column(turns, "real_tokens").sum(), _column(turns, "executed_tokens").sum()
    return max(0.0, 1.0 - float(real / executed))


def _column(turns: Sequence[Turn], key: str) -> np.ndarray:
    return np.array([turn[key] for turn in turns], dtype=np.float64)


def table(case: Mapping[str, Any]) -> Table:
    """The figures of a case for the terminal."""
    rates = case["matmul_flops_per_second"]
    shown = ", ".join(f"{name} {rates[name]['median'] / 1e9:,.0f}" for name in RATES)
    result = Table(
        title=f"{case['size']} {case['dtype']}: {case['groups_per_step']} groups a step, "
        f"{case['rounds']} rounds; matmul GFLOP/s: {shown}",
        caption="matmul share: of the square's rate / of the layers'; ours: times as fast, over "
        "all groups, and median of rounds [quartiles]",
    )
    result.add_column("")
    for column in ("groups/s", "tokens/s", "padding", "matmul share", "peak MiB", "ours: all"):
        result.add_column(column, justify="right", no_wrap=True)
    result.add_column("ours: rounds", no_wrap=True)
    for name, figures in case["contenders"].items():
        share, faster = figures["share_of_matmul_rate"], figures["ours_is_faster"]
        middle = faster["per_round"]
        result.add_row(
            name,
            f"{figures['groups_per_second']['over_all']:.2f}",
            f"{figures['real_tokens_per_second']['over_all']:,.0f}",
            f"{figures['padding_share']:.0%}",
            " / ".join(f"{share[rate]['median']:.0%}" for rate in RATES),
            f"{figures['peak_mib']:,.0f}",
            f"{faster['same_groups']:.2f}×",
            f"{middle['median']:.2f}× [{middle['q1']:.2f}–{middle['q3']:.2f}]",
        )
    return result
