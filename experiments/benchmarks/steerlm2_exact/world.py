"""Prompts whose 64 responses have known priors and likelihoods, and groups drawn of them.

A response that is drawn c times weighs like one of weight c: groups hold every outcome that was
drawn once, its c on the log-probability of the proposal. With c = n·Q′ a group is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np
import torch
from torch import Tensor

from helpsteer2.losses.steerlm2 import SteerLM2Loss, WeighedResponses

Places = tuple[Tensor, ...]
"""Group, prompt and outcome of every response."""

VOCABULARY, LONGEST, PROMPTS = 4, 3, 4
"""Tokens, tokens of a response, and prompts."""

_OUTCOMES = list(product(range(VOCABULARY), repeat=LONGEST))
_PREFIXES = [prefix for n in range(LONGEST) for prefix in product(range(VOCABULARY), repeat=n)]

OUTCOMES = torch.tensor(_OUTCOMES)
"""``(64, 3)`` tokens of each outcome."""

STATES = torch.tensor([[_PREFIXES.index(ids[:n]) for n in range(LONGEST)] for ids in _OUTCOMES])
"""``(64, 3)`` which of the 21 prefixes each token follows."""

POSITIONS = torch.arange(LONGEST).expand(len(_OUTCOMES), -1)
"""``(64, 3)`` the same for a policy that does not look at the tokens before."""


def log_probabilities(tables: Tensor, states: Tensor = STATES) -> Tensor:
    """``(K, 64)`` log-probabilities of the outcomes.

    Args:
        tables: ``(K, S, 4)`` logits of K prompts in S states.
        states: ``(64, 3)`` the state that each token is chosen in.
    """
    return tables.log_softmax(dim=-1)[:, states, OUTCOMES].sum(dim=-1)


def tables_of(logprobs: Tensor) -> Tensor:
    """``(K, 21, 4)`` logits of the policy that gives the outcomes these log-probabilities."""
    after = [logprobs.reshape(-1, *[VOCABULARY] * LONGEST)]
    while after[0].ndim > 2:
        after.insert(0, after[0].logsumexp(dim=-1))
    return torch.cat([part.reshape(len(logprobs), -1, VOCABULARY) for part in after], dim=1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """``()`` mean over prompts of KL(P ‖ Q) in nats, of ``(K, 64)`` log-probabilities."""
    return (p.exp() * (p - q)).sum(dim=1).mean()


@dataclass(frozen=True)
class World:
    """Priors and likelihoods of all outcomes, and a proposal that is a shaken prior.

    Args:
        sharpness: Mean nats that a label costs: −log P(a|x,y) is exponential, of this mean.
        seed: Of all that is random.
    """

    sharpness: float
    seed: int

    @cached_property
    def _drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (PROMPTS, len(_PREFIXES), VOCABULARY)
        prior, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        waiting = torch.rand(PROMPTS, len(OUTCOMES), generator=generator, dtype=torch.float64)
        return prior, prior + 0.5 * noise, waiting.log()

    @property
    def proposal(self) -> Tensor:
        """``(K, 21, 4)`` logits of the policy that samples and that training starts from."""
        return self._drawn[1]

    @cached_property
    def log_targets(self) -> Tensor:
        """``(K, 64)`` log P(a|x,y) + log P(y|x)."""
        return log_probabilities(self._drawn[0]) + self.sharpness * self._drawn[2]

    @property
    def posterior(self) -> Tensor:
        """``(K, 64)`` its log-probabilities."""
        return self.log_targets.log_softmax(dim=1)

    @property
    def ess_share(self) -> float:
        """Mean over prompts of effective samples over samples, of very many: 1 / E_Q′ (P/Q′)²."""
        squares = (2 * self.posterior - log_probabilities(self.proposal)).exp().sum(dim=1)
        return float((1 / squares).mean())


def drawn(rng: np.random.Generator, proposal: Tensor, n: int, groups: int) -> Tensor:
    """``(groups, K, 64)`` how often each outcome is among n samples.

    Args:
        rng: Draws.
        proposal: ``(K, 64)`` log-probabilities of the policy that samples.
        n: Responses of a group.
        groups: Of each prompt.
    """
    chances = proposal.exp().numpy()
    counts = [rng.multinomial(n, of / of.sum(), size=groups) for of in chances]
    return torch.from_numpy(np.stack(counts, axis=1)).double()


def weighed(
    counts: Tensor, logprobs: Tensor, proposal: Tensor, targets: Tensor
) -> tuple[WeighedResponses, Places]:
    """Groups for the loss, and which outcomes they hold.

    Args:
        counts: ``(groups, K, 64)`` how often each outcome was drawn.
        logprobs: ``(K, 64)`` of the policy that learns.
        proposal: ``(K, 64)`` of the policy that sampled.
        targets: ``(K, 64)`` log P(a|x,y) + log P(y|x).
    """
    groups, prompts, outcomes = counts.nonzero(as_tuple=True)
    responses = WeighedResponses(
        logprobs=logprobs[prompts, outcomes],
        ref_logprobs=proposal[prompts, outcomes] - counts[groups, prompts, outcomes].log(),
        log_targets=targets[prompts, outcomes],
        n_tokens=torch.full_like(groups, LONGEST),
        owners=groups * len(logprobs) + prompts,
        n_groups=counts.shape[0] * counts.shape[1],
    )
    return responses, (groups, prompts, outcomes)


def pushes(counts: Tensor, logprobs: Tensor, proposal: Tensor, targets: Tensor) -> Tensor:
    """``(groups, K, 64)`` gradient of each group's loss with respect to log Q of each outcome."""
    responses, places = weighed(counts, logprobs.detach(), proposal, targets)
    leaf = responses.logprobs.requires_grad_()
    loss, _ = SteerLM2Loss()(replace(responses, logprobs=leaf))
    (found,) = torch.autograd.grad(loss, leaf)
    return torch.zeros_like(counts).index_put(places, found)
