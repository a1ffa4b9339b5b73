"""Importance weights of SteerLM 2.0: how much each sample of a policy counts towards its target.

The target is the posterior P(y|a,x) ∝ P(a|x,y)·P(y|x); the samples y came from Q′(y|a,x). So a
sample weighs w = P(a|x,y)·P(y|x) / Q′(y|a,x), and w′ is w over the sum of those of its prompt.

Source: arXiv 2406.08673, section 4.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from helpsteer2.functional.importance import effective_sample_size, group_log_softmax
from helpsteer2.losses.steerlm2 import COLLAPSED, have_collapsed

FloatArray = npt.NDArray[np.float64]

BINS = 10
"""Of the histogram of weights."""


@dataclass(frozen=True)
class ImportanceTerms:
    """The three log-probabilities of R responses to G prompts, sums over their tokens, in nats.

    Attributes:
        label: ``(R,)`` log P(a|x,y), by the reward model.
        prior: ``(R,)`` log P(y|x), by the policy without labels.
        proposal: ``(R,)`` log Q′(y|a,x), by the policy that sampled, untempered.
        n_responses: ``(G,)`` responses of each prompt.
    """

    label: FloatArray
    prior: FloatArray
    proposal: FloatArray
    n_responses: npt.NDArray[np.int64]

    @property
    def log_targets(self) -> FloatArray:
        """``(R,)`` log P(a|x,y) + log P(y|x): the target up to a constant a prompt."""
        return self.label + self.prior

    @cached_property
    def log_weights(self) -> FloatArray:
        """``(R,)`` log w′."""
        values = torch.from_numpy(self.log_targets - self.proposal)
        return np.asarray(group_log_softmax(values, self._owners, len(self.n_responses)))

    @cached_property
    def effective_samples(self) -> FloatArray:
        """``(G,)`` 1 / Σ w′², from 1 to the responses of the prompt."""
        weights = torch.from_numpy(self.log_weights)
        return np.asarray(effective_sample_size(weights, self._owners, len(self.n_responses)))

    def rows(self) -> Iterator[dict[str, list[float]]]:
        """All terms and the weights of each prompt's responses, prompt after prompt."""
        columns = {
            "log_likelihood": self.label,
            "log_prior": self.prior,
            "log_proposal": self.proposal,
            "weights": np.exp(self.log_weights),
        }
        borders = np.cumsum(self.n_responses)[:-1]
        parts = {name: np.split(column, borders) for name, column in columns.items()}
        for place in range(len(self.n_responses)):
            yield {name: of[place].tolist() for name, of in parts.items()}

    def summary(self) -> dict[str, Any]:
        """Figures on the weights.

        Returns:
            ``samples`` (mean number a prompt), ``effective_samples`` (mean, median, tenth
            percentile), ``largest_weight`` (mean over prompts), ``collapsed`` (share of the prompts
            whose largest weight is above ``COLLAPSED``), ``distance`` (mean of KL(w′ ‖ 1/n), nats:
            D before the first step), ``spread`` (mean over prompts of the standard deviation within
            the prompt of log P(a|x,y), of log P(y|x) − log Q′ and of their sum, nats) and
            ``histogram`` (responses by weight, in ``BINS`` equal bins of 0–1).
        """
        weights = np.exp(self.log_weights)
        starts = np.cumsum(self.n_responses) - self.n_responses
        largest = np.maximum.reduceat(weights, starts)
        products = np.where(weights > 0, weights * self.log_weights, 0.0)
        distance = np.log(self.n_responses) + np.add.reduceat(products, starts)
        return {
            "samples": float(self.n_responses.mean()),
            "effective_samples": {
                "mean": float(self.effective_samples.mean()),
                "median": float(np.median(self.effective_samples)),
                "p10": float(np.quantile(self.effective_samples, 0.1)),
            },
            "largest_weight": float(largest.mean()),
            "collapsed": float((largest > COLLAPSED).mean()),
            "distance": float(distance.mean()),
            "spread": {
                "label": self._spread(self.label),
                "prior_to_proposal": self._spread(self.prior - self.proposal),
                "sum": self._spread(self.log_targets - self.proposal),
            },
            "histogram": np.histogram(weights, BINS, (0.0, 1.0))[0].tolist(),
        }

    @cached_property
    def _owners(self) -> torch.Tensor:
        return torch.repeat_interleave(torch.from_numpy(self.n_responses))

    def _spread(self, values: FloatArray) -> float:
        """Mean over prompts of the standard deviation within a prompt."""
        starts = np.cumsum(self.n_responses) - self.n_responses
        means = np.add.reduceat(values, starts) / self.n_responses
        squares = (values - np.repeat(means, self.n_responses)) ** 2
        return float(np.sqrt(np.add.reduceat(squares, starts) / self.n_responses).mean())


def collapse_warning(summary: dict[str, Any]) -> str | None:
    """What to say of weights that have collapsed on single responses; None if they have not.

    Args:
        summary: As ``ImportanceTerms.summary`` gives it.
    """
    effective = summary["effective_samples"]["mean"]
    if not have_collapsed(effective, summary["collapsed"]):
        return None
    spread = summary["spread"]
    is_label = spread["label"] > spread["prior_to_proposal"]
    advice = (
        "the label's likelihood decides alone: a lower likelihood.concentration or "
        "likelihood.combine=mean would let more of them count"
        if is_label
        else "prior and proposal are far apart: fewer or smaller steps in the training before it"
    )
    return (
        f"the weights have collapsed: {effective:.1f} of {summary['samples']:.0f} samples a prompt "
        f"count, and {summary['collapsed']:.0%} of the prompts have more than {COLLAPSED:.0%} of "
        f"their weight on one response. Within a prompt log P(a|x,y) spreads by "
        f"{spread['label']:.1f} nats and log P(y|x) − log Q′ by "
        f"{spread['prior_to_proposal']:.1f}; {advice}; so would more samples"
    )
