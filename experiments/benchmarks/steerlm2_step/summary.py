"""From the turns of all contenders to figures, a verdict on equality, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from experiments.benchmarks.reward_step.summary import spread

SCORING, TRAINING = "scoring", "training"
PHASES = (SCORING, TRAINING)

OURS, USUAL, SINGLE = "ours", "usual", "single"
"""Ours; a prompt's rows as one padded batch and all its logits; rows one by one, not padded."""

TOLERANCE = 1e-4
"""Of a token's log-probability in nats, and of loss and gradient norm relative to ours."""

Turn = Mapping[str, Any]
Turns = Mapping[str, Sequence[Turn]]
"""Of the contenders of a phase, what they reported in each round."""


def differences(phase: str, reports: Mapping[str, Turn]) -> dict[str, dict[str, float]]:
    """How far the numbers of every peer are from ours, in one round.

    Args:
        phase: ``scoring``, or ``training`` before the first update: after it rounding adds up.
        reports: What ours and the peers have reported.

    Returns:
        Of each peer the largest difference of a token's log-probability in nats; in training those
        of loss and gradient norm, relative.

    Raises:
        ValueError: If one is above ``TOLERANCE``, or a peer has not read the same responses.
    """
    ours, found = reports[OURS], {}
    for name, own in reports.items():
        if name == OURS:
            continue
        if phase == SCORING:
            if own["logprobs"].shape != ours["logprobs"].shape:
                raise ValueError(f"{name} and ours read different responses")
            found[name] = {"logprob": float(np.abs(own["logprobs"] - ours["logprobs"]).max())}
        else:
            found[name] = {
                key: abs(own[key] - ours[key]) / abs(ours[key]) for key in ("loss", "gradient_norm")
            }
        # Written so that a NaN is refused.
        wrong = [key for key, value in found[name].items() if not value <= TOLERANCE]
        if wrong:
            raise ValueError(f"{name} and ours compute different numbers: {found[name]}")
    return found


def summarise(turns: Mapping[str, Turns]) -> dict[str, Any]:
    """Figures of the measured rounds.

    Args:
        turns: Of each phase, what ours and the peers reported in each round.

    Returns:
        ``phases``: of each phase its contenders; ``together``: scoring and training one after the
        other, of ours and of three peers: ``usual``, ``fastest_padded`` (the fastest setting of
        each phase that pads) and ``fastest`` (single rows as well). ``ours_is_faster`` says how
        many times: ``per_round`` within each round, ``total`` by the time of all rounds.
    """
    seconds = {
        phase: {name: _column(own, "seconds") for name, own in turns[phase].items()}
        for phase in PHASES
    }
    phases = {
        phase: {
            name: _figures(own, seconds[phase][name], seconds[phase][OURS])
            for name, own in turns[phase].items()
        }
        for phase in PHASES
    }
    settings: dict[str, dict[str, str | None]] = {
        "usual": dict.fromkeys(PHASES, USUAL),
        "fastest_padded": {phase: fastest(seconds[phase], (OURS, SINGLE)) for phase in PHASES},
        "fastest": {phase: fastest(seconds[phase], (OURS,)) for phase in PHASES},
    }
    responses = _column(turns[SCORING][OURS], "responses")
    ours = seconds[SCORING][OURS] + seconds[TRAINING][OURS]
    together: dict[str, Any] = {OURS: {"responses_per_second": spread(responses / ours)}}
    for name, chosen in settings.items():
        parts = [seconds[phase][n] for phase, n in chosen.items() if n in seconds[phase]]
        if len(parts) == len(PHASES):
            both = np.sum(parts, axis=0)
            together[name] = {
                "settings": chosen,
                "responses_per_second": spread(responses / both),
                "ours_is_faster": _ratios(both, ours),
            }
    return {"phases": phases, "together": together}


def fastest(seconds: Mapping[str, npt.NDArray[np.float64]], without: Sequence[str]) -> str | None:
    """The contender with the least time of all rounds; None if all are left out."""
    left = {name: float(own.sum()) for name, own in seconds.items() if name not in without}
    return min(left, key=left.__getitem__, default=None)


def slower_ones(seconds: Mapping[str, float], keep: int) -> list[str]:
    """Peers of a phase that need not be measured further.

    Args:
        seconds: Of every contender in a round of warm-up.
        keep: How many peers go on beside ``usual``: the fastest, and of those that pad as many.
    """
    peers = sorted((n for n in seconds if n not in (OURS, USUAL)), key=seconds.__getitem__)
    padded = [name for name in peers if name != SINGLE]
    going_on = {*peers[:keep], *padded[:keep]}
    return [name for name in peers if name not in going_on]


def _figures(
    turns: Sequence[Turn], seconds: npt.NDArray[np.float64], ours: npt.NDArray[np.float64]
) -> dict[str, Any]:
    responses, executed = _column(turns, "responses"), _column(turns, "executed_tokens")
    return {
        "responses_per_second": spread(responses / seconds),
        "executed_tokens_per_response": float(executed.sum() / responses.sum()),
        "padding_share": 1 - float(_column(turns, "real_tokens").sum() / executed.sum()),
        "peak_mib": max(turn["peak_mib"] for turn in turns),
        "ours_is_faster": _ratios(seconds, ours),
        "rounds": {"seconds": seconds.tolist()},
    }


def _ratios(own: npt.NDArray[np.float64], ours: npt.NDArray[np.float64]) -> dict[str, Any]:
    return {"per_round": spread(own / ours), "total": float(own.sum() / ours.sum())}


def _column(turns: Sequence[Turn], key: str) -> npt.NDArray[np.float64]:
    return np.array([turn[key] for turn in turns], dtype=np.float64)


def table(case: Mapping[str, Any]) -> Table:
    """The figures of a case for the terminal."""
    result = Table(
        title=f"{case['size']}: {case['prompts_per_step']} prompts × {case['responses']} a step, "
        f"{case['rounds']} rounds",
        caption="medians; ours is faster: per round \\[quartiles] / ratio of total times",
    )
    result.add_column("")
    columns = ("responses/s", "tokens a response", "padding", "peak MiB", "ours is faster")
    for column in columns:
        result.add_column(column, justify="right", no_wrap=True)
    for phase, contenders in case["phases"].items():
        for name, own in contenders.items():
            result.add_row(
                f"{phase}: {name}",
                f"{own['responses_per_second']['median']:.2f}",
                f"{own['executed_tokens_per_response']:,.0f}",
                f"{own['padding_share']:.0%}",
                f"{own['peak_mib']:,.0f}",
                _shown(own),
            )
        result.add_section()
    for name, own in case["together"].items():
        speed = f"{own['responses_per_second']['median']:.2f}"
        result.add_row(f"together: {name}", speed, "", "", "", _shown(own))
    return result


def _shown(own: Mapping[str, Any]) -> str:
    if "ours_is_faster" not in own:
        return ""
    ratio = own["ours_is_faster"]["per_round"]
    return (
        f"{ratio['median']:.2f}× [{ratio['q1']:.2f}–{ratio['q3']:.2f}] / "
        f"{own['ours_is_faster']['total']:.2f}×"
    )
