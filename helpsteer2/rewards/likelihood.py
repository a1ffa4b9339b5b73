"""How well a response fits an attribute label: log P(a | x, y) from a reward model's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from helpsteer2.attributes import RATING_MAX, RATING_MIN
from helpsteer2.data.labels import AttributeLabel, in_order
from helpsteer2.errors import UserError
from helpsteer2.functional.beta_ratings import (
    CONCENTRATIONS,
    LOG_TINY,
    PAPER_CONCENTRATION,
    Edges,
    Reading,
    Scaling,
    log_mass,
)
from helpsteer2.functional.statistics import FloatArray, IntArray

Combine = Literal["product", "mean"]
"""How attributes become one probability: their product, or its A-th root."""


@dataclass(frozen=True)
class BetaLikelihood:
    """The probability of a label's ratings, given the scores of a response.

    A score r becomes a mean u in (0, 1); the probability of level n is the mass of
    Beta(c·u, c·(1 − u)) between two bin edges. The paper says this much and c = 24. Everything else
    is chosen here, and can be chosen otherwise.

    Args:
        concentration: c = α + β, that of the paper: a standard deviation of 0.4 to 0.5 levels in
            the middle of the scale. The evaluator ``label_likelihood`` tells which one a reward
            model's errors ask for, usually a smaller one.
        scaling: How r becomes u; with ``edges`` one of three readings. C, (r + ½)/5 with fifths, is
            the default: it keeps the paper's equal bins, is even-handed between neighbouring
            levels, and needs no clamp, so that nothing depends on a number that the paper does not
            give. A, r/4 with the nearest level, has r as its very mean, but at r = 0 and r = 4
            nothing is left of the distribution and the clamp alone says how probable the other
            levels are. B, r/4 with fifths, is the paper word by word, but leans outwards: r = 3.6
            has 93 % at level 4.
        edges: Where levels end. ``nearest`` with ``centred`` is neither and is refused.
        clamp: How far u stays from 0 and 1, where there is no Beta distribution; C never comes
            near. 0.01 is 0.04 of a rating: far less than any reward model errs by, so that a score
            of 4.0 says no more than one of 3.96.
        floor: The least log-probability of an attribute, in nats, so that there is no log of 0. At
            −100 it changes nothing at the paper's concentration (the least there is is −53, in
            reading A) and keeps larger ones finite.
        combine: ``product`` takes attributes as independent given the response: the plain reading
            of a probability of the whole label. They are not quite (correctness goes with
            helpfulness), so that it counts some evidence twice; ``mean`` divides the sum of logs by
            the number of attributes, as if all told the same.
        attributes: Those of the label that count; None takes all that it names.

    Raises:
        UserError: If an option is out of range, or two do not go together.

    Source: arXiv 2406.08673, section 4.5.
    """

    concentration: float = PAPER_CONCENTRATION
    scaling: Scaling = "centred"
    edges: Edges = "fifths"
    clamp: float = 0.01
    floor: float = -100.0
    combine: Combine = "product"
    attributes: Sequence[str] | None = None

    def __post_init__(self) -> None:
        wrong = []
        try:
            Reading(self.scaling, self.edges, self.clamp)
        except ValueError as error:
            wrong.append(str(error))
        least, most = CONCENTRATIONS
        if not least <= self.concentration <= most:
            wrong.append(f"concentration={self.concentration} has to be {least:g} to {most:g}")
        if not LOG_TINY <= self.floor < 0.0:
            wrong.append(f"floor={self.floor} has to be below 0, and no less than {LOG_TINY:.0f}")
        if self.combine not in get_args(Combine):
            wrong.append(f"combine={self.combine} is none of {', '.join(get_args(Combine))}")
        if self.attributes is not None and (
            not self.attributes or len(set(self.attributes)) < len(self.attributes)
        ):
            wrong.append(f"attributes={list(self.attributes)} has to name some, each once")
        if wrong:
            raise UserError(f"likelihood: {'; '.join(wrong)}")

    @property
    def reading(self) -> Reading:
        """Scaling, edges and clamp."""
        return Reading(self.scaling, self.edges, self.clamp)

    def log_probability(
        self, scores: npt.ArrayLike, score_names: Sequence[str], label: AttributeLabel
    ) -> FloatArray:
        """Log-probability of one label for each of some responses.

        Args:
            scores: ``(R, A)`` scores, meant as ratings 0–4; those outside count as 0 or 4.
            score_names: Names of the A scores.
            label: The label.

        Returns:
            ``(R,)`` float64, nats.

        Raises:
            UserError: As ``log_probabilities``.
        """
        return self.log_probabilities([scores], score_names, [label])[0]

    def log_probabilities(
        self,
        scores: Sequence[npt.ArrayLike],
        score_names: Sequence[str],
        labels: Sequence[AttributeLabel],
    ) -> list[FloatArray]:
        """Log-probability of the label of each group for each of its responses, all at once.

        Args:
            scores: ``(n, A)`` scores of each group, meant as ratings 0–4; those outside count as 0
                or 4.
            score_names: Names of the A scores.
            labels: One a group.

        Returns:
            ``(n,)`` float64 of each group, nats.

        Raises:
            UserError: If an attribute that counts has no score or is not in the label, or a score
                that counts is not finite.
        """
        blocks: list[FloatArray] = []
        levels: list[IntArray] = []
        for of_group, label in zip(scores, labels, strict=True):
            block, level = self._counted(of_group, score_names, label)
            blocks.append(block)
            levels.append(np.broadcast_to(level, block.shape))
        if not blocks:
            return []
        # One call for all: a call a group would take a hundred times as long.
        flat = np.concatenate([block.ravel() for block in blocks])
        if not np.isfinite(flat).all():
            raise UserError(
                f"likelihood: {int((~np.isfinite(flat)).sum()):,} of {flat.size:,} scores are not "
                "finite: annotate the responses again"
            )
        logs = log_mass(
            flat,
            np.concatenate([level.ravel() for level in levels]),
            self.concentration,
            self.reading,
            self.floor,
        )
        ends = np.cumsum([block.size for block in blocks])[:-1]
        return [
            self._combined(part.reshape(block.shape))
            for part, block in zip(np.split(logs, ends), blocks, strict=True)
        ]

    def counted(self, score_names: Sequence[str], label: AttributeLabel) -> tuple[str, ...]:
        """The attributes of a label that count, in the order of labels.

        Args:
            score_names: Names of the scores.
            label: The label.

        Raises:
            UserError: If one of them has no score, or is not in the label.
        """
        names = label.names if self.attributes is None else in_order(self.attributes)
        unknown = [name for name in names if name not in label.names]
        if unknown:
            raise UserError(
                f"likelihood.attributes asks for {', '.join(unknown)}, which the label "
                f"{label.text} does not name: leave them out, or label the data anew"
            )
        unscored = [name for name in names if name not in score_names]
        if unscored:
            raise UserError(
                f"the label {label.text} is to be judged by {', '.join(unscored)}, which the "
                f"reward model does not score (it scores {', '.join(score_names)}): name those "
                "that shall count in likelihood.attributes, or take another reward model"
            )
        return tuple(names)

    def _counted(
        self, scores: npt.ArrayLike, score_names: Sequence[str], label: AttributeLabel
    ) -> tuple[FloatArray, IntArray]:
        """Scores and ratings of the attributes that count: ``(n, K)`` and ``(K,)``."""
        array = np.asarray(scores, dtype=np.float64)
        if array.ndim != 2 or array.shape[1] != len(score_names):
            raise ValueError(f"scores of shape {array.shape} for {len(score_names)} names")
        names, ratings = self.counted(score_names, label), label.as_dict()
        levels = np.array([ratings[name] for name in names], dtype=np.int64)
        return array[:, [list(score_names).index(name) for name in names]], levels

    def _combined(self, logs: FloatArray) -> FloatArray:
        """``(n, K)`` of attributes → ``(n,)`` of labels."""
        return np.asarray(logs.sum(axis=1) if self.combine == "product" else logs.mean(axis=1))


def outside(scores: npt.ArrayLike) -> IntArray:
    """How many scores lie outside 0–4, and are taken as 0 or 4.

    Args:
        scores: ``(R, A)``.

    Returns:
        ``(A,)`` counts; NaN is not counted.
    """
    array = np.asarray(scores, dtype=np.float64)
    return np.asarray(((array < RATING_MIN) | (array > RATING_MAX)).sum(axis=0))
