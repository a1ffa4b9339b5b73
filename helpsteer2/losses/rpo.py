"""Reward-aware preference optimisation (RPO): the policy learns how much better a response is."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from helpsteer2.errors import UserError
from helpsteer2.losses.dpo import DPOLoss, PairLogprobs


class SquaredRPOLoss(DPOLoss):
    """``(βD − g)²``: the implicit rewards of the two responses shall differ as the known ones do.

    g = η·(r_chosen − r_rejected). DPO drives βD towards infinity however close the two responses
    are; here it has a target.

    Args:
        beta: As in ``DPOLoss``.
        average_logprobs: As in ``DPOLoss``.
        eta: η, what a unit of the known reward is worth.

    Raises:
        UserError: If ``beta`` or ``eta`` is not a positive number.

    Source: arXiv 2406.11704 (Nemotron-4 340B); NVIDIA/NeMo-Aligner at af2b3bd9,
    megatron_gpt_dpo_model.py (``rpo_sq``, ``gt_reward_scale``).
    """

    formula = "RPO loss (βD − g)² on pairs of known rewards"

    def __init__(self, beta: float = 0.1, average_logprobs: bool = False, eta: float = 1.0) -> None:
        super().__init__(beta, average_logprobs)
        if not 0 < eta < math.inf:
            raise UserError(f"module.loss.eta has to be a number above 0, got {eta}")
        self.eta = eta

    @property
    def objective(self) -> str:
        """The loss in words, for the model card."""
        return f"{super().objective}, η = {self.eta:g}"

    def terms(self, gap: Tensor, pairs: PairLogprobs) -> Tensor:
        """Loss of each pair; arguments and result as in ``DPOLoss.terms``."""
        return (self.beta * gap - self.target(pairs)).square()

    def target(self, pairs: PairLogprobs) -> Tensor:
        """Wanted margin g of each pair, ``(P,)`` float32."""
        return self.eta * pairs.reward_gap


class BackwardKLRPOLoss(SquaredRPOLoss):
    """``KL(σ(g) ‖ σ(βD))`` of the two Bernoulli distributions: the RPO of the paper.

    Source: as in ``SquaredRPOLoss``; NeMo-Aligner calls it ``rpo_bwd_kl``.
    """

    formula = "RPO loss KL(σ(g) ‖ σ(βD)) on pairs of known rewards"

    def terms(self, gap: Tensor, pairs: PairLogprobs) -> Tensor:
        """Loss of each pair; arguments and result as in ``DPOLoss.terms``."""
        return _bernoulli_kl(self.target(pairs), self.beta * gap)


class ForwardKLRPOLoss(SquaredRPOLoss):
    """``KL(σ(βD) ‖ σ(g))``, the other way round.

    Source: as in ``SquaredRPOLoss``; NeMo-Aligner calls it ``rpo_fwd_kl``.
    """

    formula = "RPO loss KL(σ(βD) ‖ σ(g)) on pairs of known rewards"

    def terms(self, gap: Tensor, pairs: PairLogprobs) -> Tensor:
        """Loss of each pair; arguments and result as in ``DPOLoss.terms``."""
        return _bernoulli_kl(self.beta * gap, self.target(pairs))


def _bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(σ(a) ‖ σ(b)) from logits, in nats."""
    yes = a.sigmoid() * (logsigmoid(a) - logsigmoid(b))
    no = (-a).sigmoid() * (logsigmoid(-a) - logsigmoid(-b))
    return yes + no
