"""Masked squared error between scores and ratings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from helpsteer2.errors import UserError


class RegressionLoss:
    """Squared error of every known rating; unknown ones weigh nothing.

    Over an optimizer step the loss is ``Σ w_a·m·(s − r)² / Σ m``, both sums over all micro-batches
    of all ranks (m is 1 where a rating is known). It is a mean over ratings, not over responses,
    and does not change with the size of the micro-batches. NeMo-Aligner divides by the known
    ratings of each micro-batch, which differs where the missing ones are spread unevenly.

    Args:
        attribute_loss_weights: Weight ``w_a ≥ 0`` of an attribute by its name; 1 for those left
            out. It shapes the training, unlike ``AttributeWeights``, which only reads the scores.

    Raises:
        UserError: If a weight is negative or not finite.

    Source: arXiv 2406.08673, section 3 and appendix H (MSE on ratings 0–4); the sum and the count
    apart as in fairseq2's train units.
    """

    def __init__(self, attribute_loss_weights: Mapping[str, float] | None = None) -> None:
        self.attribute_loss_weights = dict(attribute_loss_weights or {})
        self.weights: tuple[float, ...] | None = None
        for name, weight in self.attribute_loss_weights.items():
            if not math.isfinite(weight) or weight < 0:
                raise UserError(
                    f"attribute_loss_weights: {name} is {weight}, but a weight is finite and at "
                    "least 0"
                )

    def bind(self, attribute_names: Sequence[str]) -> RegressionLoss:
        """Put the weights in the order of a model's outputs.

        Args:
            attribute_names: Names of the A outputs.

        Returns:
            A loss whose ``weights`` are the A weights in that order.

        Raises:
            UserError: If a weighted attribute is not among the names, or every weight is 0.
        """
        unknown = [name for name in self.attribute_loss_weights if name not in attribute_names]
        if unknown:
            raise UserError(
                f"attribute_loss_weights names {', '.join(unknown)}, but the model is trained on "
                f"{', '.join(attribute_names)}"
            )
        bound = RegressionLoss(self.attribute_loss_weights)
        bound.weights = tuple(
            float(self.attribute_loss_weights.get(a, 1.0)) for a in attribute_names
        )
        if not any(bound.weights):
            raise UserError(
                "attribute_loss_weights: every weight is 0, so nothing would be learned"
            )
        return bound

    def count(self, attributes: Tensor) -> Tensor:
        """Number of known ratings, the denominator of the loss.

        Args:
            attributes: ``(R, A)`` float32 ratings, NaN where unknown.

        Returns:
            ``()`` int64.
        """
        return (~attributes.isnan()).sum()

    def __call__(self, scores: Tensor, attributes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the weighted squared errors, in fp32 whatever autocast says.

        Args:
            scores: ``(R, A)`` float, in rating units.
            attributes: ``(R, A)`` float32 ratings 0–4, NaN where unknown.

        Returns:
            The loss sum ``()`` float32, and the detached sums ``squared_error`` ``(A,)`` float32
            (unweighted) and ``known`` ``(A,)`` int64.

        Raises:
            ValueError: If the shapes differ, or ``bind`` was not called.
        """
        if scores.shape != attributes.shape:
            raise ValueError(
                f"scores are {tuple(scores.shape)}, attributes {tuple(attributes.shape)}"
            )
        if self.weights is None:
            raise ValueError("the loss does not know the order of the outputs: call bind first")
        with torch.autocast(scores.device.type, enabled=False):
            known = ~attributes.isnan()
            # Zero before the square: NaN · 0 is NaN, also in the gradient.
            error = torch.where(known, scores.float() - attributes.float().nan_to_num(), 0.0)
            squared = (error * error).sum(dim=0)
            loss = (squared * squared.new_tensor(self.weights)).sum()
        return loss, {"squared_error": squared.detach(), "known": known.sum(dim=0)}
