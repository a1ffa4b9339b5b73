"""Which policy each objective leads to, computed over all responses.

With ``k1`` in the reward an update ascends E r − β KL(π ‖ π_ref) over whole responses, whose
optimum is π_ref·exp(r/β), normalised. The other estimators, and the loss, lead elsewhere:

* Averaged over the tokens of a response, ``k1`` prices a nat by the length of the response: where
  the update rests, r − β log(π/π_ref) / length is the same for all of them.
* In the loss each token answers for its own distribution alone. With Q the reward to expect behind
  a token, the update rests where each state's distribution is the best one at Σ π Q − β D: for
  ``k2`` D is KL(π ‖ π_ref), for ``k3`` KL(π_ref ‖ π), for ``abs`` Σ |π − π_ref|.
* In the reward ``k2``, ``k3`` and ``abs`` are prices that rise on both sides of the reference. What
  earns less than the others falls below the reference, pays more and so falls on, until it is gone:
  nothing can rest below. What stays depends on the way, so there is no destination to compute;
  ``driven_out`` tells how much has gone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from experiments.benchmarks.exact_optima.world import Array, Responses
from helpsteer2.functional.kl import KLEstimator


def total_variation(p: Array, q: Array) -> float:
    """Half the sum of absolute differences: 0 (the same) to 1 (nothing in common)."""
    return float(np.abs(p - q).sum() / 2)


def driven_out(p: Array, reference: Array) -> float:
    """Share of the reference on responses that have less than a hundredth of its probability."""
    return float(reference[p < reference / 100].sum())


def tilted(reference: Array, rewards: Array, beta: float) -> Array:
    """``(R,)`` π_ref·exp(r/β), normalised.

    Args:
        reference: ``(R,)`` log-probabilities of the reference.
        rewards: ``(R,)``.
        beta: Price of a nat.
    """
    logits = reference + rewards / beta
    return np.asarray(np.exp(logits - np.logaddexp.reduce(logits)))


def priced_by_length(
    reference: Array, rewards: Array, lengths: npt.NDArray[np.int64], beta: float
) -> Array:
    """``(R,)`` where ``k1`` averaged over tokens leads; arguments as in ``tilted``."""

    def at(level: float) -> Array:
        return np.asarray(np.exp(reference + lengths * (rewards - level) / beta))

    return _normalised(at, rewards.min(), rewards.max())


def in_the_loss(
    responses: Responses, reference: Array, rewards: Array, beta: float, estimator: KLEstimator
) -> Array:
    """``(R,)`` where an estimator in the loss leads, from the last tokens to the first.

    Args:
        responses: All responses.
        reference: ``(S, V)`` log-probabilities of the reference.
        rewards: ``(R,)``.
        beta: Price of a nat.
        estimator: ``k2``, ``k3`` or ``abs``.
    """
    best = {"k2": _best_forward, "k3": _best_reverse, "abs": _best_variation}[estimator]
    reward_of = dict(zip(responses.ids, rewards.tolist(), strict=True))
    table = np.empty_like(reference)
    value: dict[tuple[int, ...], float] = {}
    for state, number in reversed(responses.prefixes.items()):
        following = [(*state, token) for token in range(reference.shape[1])]
        q = np.array([reward_of[ids] if ids in reward_of else value[ids] for ids in following])
        chosen = best(np.exp(reference[number]), q, beta)
        value[state] = float(chosen @ q)
        with np.errstate(divide="ignore"):
            table[number] = np.log(chosen)
    return np.asarray(np.exp(responses.logprobs(table)))


def _best_forward(reference: Array, q: Array, beta: float) -> Array:
    """Of Σ π Q − β KL(π ‖ π_ref)."""
    return tilted(np.log(reference), q, beta)


def _best_reverse(reference: Array, q: Array, beta: float) -> Array:
    """Of Σ π Q − β KL(π_ref ‖ π): β π_ref / (c − Q)."""

    def at(level: float) -> Array:
        return beta * reference / (level - q)

    nearest = q.max() + beta * reference[q.argmax()]  # there one token has all the mass
    return _normalised(at, nearest, q.max() + beta)


def _normalised(at: Callable[[float], Array], low: float, high: float) -> Array:
    """The one distribution among the measures ``at`` a level, whose mass falls with the level."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).sum() > 1 else (low, middle)
    return at(high)


def _best_variation(reference: Array, q: Array, beta: float) -> Array:
    """Of Σ π Q − β Σ |π − π_ref|: to move mass costs 2 β, so it goes to the best token or stays."""
    chosen = np.where(q < q.max() - 2 * beta, 0.0, reference)
    chosen[q.argmax()] += 1 - chosen.sum()
    return chosen
