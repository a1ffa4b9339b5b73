"""How much better than expected each sampled token, or response, has turned out."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from helpsteer2.functional.running import PairwiseMoments

Array = npt.NDArray[np.float64]

GROUP_EPSILON = 1e-4
"""Added to the standard deviation of a group's rewards, as TRL does."""


def gae(
    rewards: npt.ArrayLike,
    values: npt.ArrayLike,
    lengths: npt.ArrayLike,
    *,
    gamma: float,
    lam: float,
) -> Array:
    """Generalised advantage estimation over the tokens of responses that lie end to end.

    ``A_t = Σ_l (γλ)^l δ_{t+l}`` within the response, with ``δ_t = r_t + γ V_{t+1} − V_t``; behind
    its last token V is 0, whether it was finished or cut: nothing more will be earned.

    Args:
        rewards: ``(N,)`` reward of each token, response after response.
        values: ``(N,)`` value of the state in which each token was chosen.
        lengths: ``(R,)`` tokens of each response, N in all; a response may have none.
        gamma: γ, 1 in RLHF: a reward is worth the same whenever it comes.
        lam: λ, 1 gives reward-to-go minus value, 0 the one-step error.

    Returns:
        ``(N,)`` advantages; with the values they sum to the returns that a critic learns.

    Raises:
        ValueError: If the lengths do not fit.

    Source: arXiv 1506.02438, equation 16.
    """
    r, v = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    n = np.asarray(lengths, np.int64)
    if not len(r) == len(v) == n.sum():
        raise ValueError(
            f"{len(r)} rewards and {len(v)} values for {len(n)} responses of {n.sum()} tokens"
        )
    ends = np.cumsum(n)
    following = np.append(v[1:], 0.0)
    following[ends[n > 0] - 1] = 0.0
    delta = r + gamma * following - v
    advantages = np.zeros(len(r))
    carried = np.zeros(len(n))
    # The last tokens of all responses together, then those before them.
    for back in range(1, int(n.max(initial=0)) + 1):
        there = n >= back
        place = ends[there] - back
        carried[there] = delta[place] + gamma * lam * carried[there]
        advantages[place] = carried[there]
    return advantages


class Whitening:
    """Shift to mean 0 and scale to standard deviation 1, over values that come in parts."""

    def __init__(self) -> None:
        self._moments = PairwiseMoments(1)

    def add(self, values: npt.NDArray[np.float64]) -> None:
        """Take values in, of the real tokens of a whole batch in the end.

        Args:
            values: ``(N,)``, part of them.
        """
        if len(values):
            self._moments.add(values[:, None])

    def __call__(self, values: npt.NDArray[np.float64]) -> Array:
        """Shift and scale by what was taken in.

        Args:
            values: ``(N,)``, those or others.

        Returns:
            ``(N,)``; zeros if all that was taken in is the same, as nothing is to tell apart.
        """
        n = int(self._moments.counts()[0])
        if n < 2:
            return np.zeros_like(values)
        mean = float(self._moments.means()[0])
        spread = float(self._moments.stds()[0]) * math.sqrt((n - 1) / n)
        # What is left of equal values after subtracting is rounding.
        if spread <= 1e-9 * max(1.0, abs(mean)):
            return np.zeros_like(values)
        return np.asarray((values - mean) / spread)


def leave_one_out(rewards: npt.ArrayLike, counted: npt.ArrayLike | None = None) -> Array:
    """Baseline of each response: the mean reward of the other ones of its prompt.

    It does not depend on the response itself, so subtracting it leaves the expected policy gradient
    as it is.

    Args:
        rewards: ``(G, k)`` reward of k responses to each prompt.
        counted: ``(G, k)`` bool, which rewards may stand in the mean of others; all by default.

    Returns:
        ``(G, k)``; the response's own reward where no other counts, which makes its advantage 0.

    Source: arXiv 2402.14740, section 3.2.
    """
    r = np.asarray(rewards, np.float64)
    use = np.ones(r.shape, bool) if counted is None else np.asarray(counted, bool)
    kept = np.where(use, r, 0.0)
    others = use.sum(axis=1, keepdims=True) - use
    totals = kept.sum(axis=1, keepdims=True) - kept
    return np.where(others > 0, totals / np.maximum(others, 1), r)


def group_normalised(rewards: npt.ArrayLike, counted: npt.ArrayLike | None = None) -> Array:
    """Advantages of GRPO: rewards of a prompt's responses, less their mean, over their spread.

    Args:
        rewards: ``(G, k)`` reward of k responses to each prompt.
        counted: ``(G, k)`` bool, which rewards mean and spread are of; all by default.

    Returns:
        ``(G, k)``; zeros for a prompt whose responses earn the same, or of which fewer than two
        count.

    Source: arXiv 2402.03300, section 4.1.2; the spread is that of a sample (k − 1), as in TRL.
    """
    r = np.asarray(rewards, np.float64)
    use = np.ones(r.shape, bool) if counted is None else np.asarray(counted, bool)
    n = use.sum(axis=1, keepdims=True)
    means = np.where(use, r, 0.0).sum(axis=1, keepdims=True) / np.maximum(n, 1)
    centred = r - means
    squares = np.where(use, centred**2, 0.0).sum(axis=1, keepdims=True)
    spread = np.sqrt(squares / np.maximum(n - 1, 1))
    return np.where(n > 1, centred / (spread + GROUP_EPSILON), 0.0)
