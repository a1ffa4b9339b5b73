"""From the turns of all contenders to figures and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

Turn = Mapping[str, Any]
RATES = ("square", "layers")


@dataclass(frozen=True)
class Heat:
    """Measured rounds of the contenders that were alive together.

    Attributes:
        turns: Of each contender, what it reported in each round.
        rates: The matmul rates of each round.
    """

    turns: Mapping[str, Sequence[Turn]]
    rates: Sequence[Turn]


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "q1": low, "q3": high}


def summarise(heats: Sequence[Heat], ours: str) -> dict[str, dict[str, Any]]:
    """Figures of every contender over the measured rounds.

    Steps differ in length and machines stall, so speed is the median over rounds of real tokens a
    second, and groups a second are those tokens over the mean group of the run: all contenders
    have the same groups in the run, whichever their order.

    Args:
        heats: What was measured together. Ours is in each of them; its figures are of all heats,
            and a peer is compared with ours in its own heat.
        ours: Name of the contender that the others are compared with.

    Returns:
        Of each contender its figures. ``ours_is_faster`` says how many times: ``per_round`` is the
        median ratio of a round, ``medians`` the ratio of the medians, ``total`` that of the times
        of the whole run, stalls included.

    Raises:
        ValueError: If the contenders did not have the same groups.
    """
    totals = {
        int(_column(own, "real_tokens").sum()) for heat in heats for own in heat.turns.values()
    }
    if len(totals) > 1:
        raise ValueError(f"the contenders read different groups: {sorted(totals)} tokens")
    pooled = [turn for heat in heats for turn in heat.turns[ours]]
    figures = {ours: _figures(pooled, pooled, [rate for heat in heats for rate in heat.rates])}
    for heat in heats:
        for name, own in heat.turns.items():
            if name != ours:
                figures[name] = _figures(own, heat.turns[ours], heat.rates)
    return figures


def _figures(turns: Sequence[Turn], ours: Sequence[Turn], rates: Sequence[Turn]) -> dict[str, Any]:
    seconds, our_seconds = _column(turns, "seconds"), _column(ours, "seconds")
    speed = _column(turns, "real_tokens") / seconds
    our_speed = _column(ours, "real_tokens") / our_seconds
    per_token = {
        name: float(_column(turns, name).sum() / _column(turns, "real_tokens").sum())
        for name in ("groups", "executed_tokens", "model_flops", "executed_flops")
    }
    return {
        "real_tokens_per_second": spread(speed),
        **{f"{name}_per_second": spread(speed * share) for name, share in per_token.items()},
        "share_of_matmul_rate": {
            rate: spread(_column(turns, "model_flops") / seconds / _column(rates, rate))
            for rate in RATES
        },
        "padding_share": _padding(turns),
        "peak_mib": max(turn["peak_mib"] for turn in turns),
        "ours_is_faster": {
            "per_round": spread(our_speed / speed),
            "medians": float(np.median(our_speed) / np.median(speed)),
            "total": float(seconds.sum() / our_seconds.sum()),
        },
        "rounds": {
            name: [turn[name] for turn in turns] for name in ("seconds", "real_tokens", "rows")
        },
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
        caption="medians; matmul share: of the square's rate / of the layers'\n"
        "ours is faster: per round \\[quartiles] / ratio of medians / ratio of total times",
    )
    result.add_column("")
    for column in ("groups/s", "tokens/s", "padding", "matmul share", "peak MiB", "ours is faster"):
        result.add_column(column, justify="right", no_wrap=True)
    for name, figures in case["contenders"].items():
        share, faster = figures["share_of_matmul_rate"], figures["ours_is_faster"]
        middle = faster["per_round"]
        result.add_row(
            name,
            f"{figures['groups_per_second']['median']:.2f}",
            f"{figures['real_tokens_per_second']['median']:,.0f}",
            f"{figures['padding_share']:.0%}",
            " / ".join(f"{share[rate]['median']:.0%}" for rate in RATES),
            f"{figures['peak_mib']:,.0f}",
            f"{middle['median']:.2f}× [{middle['q1']:.2f}–{middle['q3']:.2f}] / "
            f"{faster['medians']:.2f}× / {faster['total']:.2f}×",
        )
    return result
