"""A policy so small that expectations over its responses are sums; random rollouts."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from helpsteer2.data.tokens import RolloutTokens
from helpsteer2.functional.logprobs import TokenLogprobs

VOCABULARY, LONGEST = 3, 3
"""Token 0 ends a response; three tokens end it as well."""


def _is_response(ids: tuple[int, ...]) -> bool:
    return 0 not in ids[:-1] and (ids[-1] == 0 or len(ids) == LONGEST)


STRINGS = [
    ids
    for length in range(1, LONGEST + 1)
    for ids in product(range(VOCABULARY), repeat=length)
    if _is_response(ids)
]
"""All 1 + 2 + 12 = 15 responses; end to end they have 41 tokens."""

_PREFIXES = sorted({ids[:n] for ids in STRINGS for n in range(len(ids))})
STATES = torch.tensor([_PREFIXES.index(ids[:n]) for ids in STRINGS for n in range(len(ids))])
CHOICES = torch.tensor([token for ids in STRINGS for token in ids])
LENGTHS = torch.tensor([len(ids) for ids in STRINGS])
RESPONSES = torch.arange(len(STRINGS)).repeat_interleave(LENGTHS)


def random_table(seed: int) -> Tensor:
    """Logits ``(states, vocabulary)`` float64: a policy."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(_PREFIXES), VOCABULARY, generator=generator, dtype=torch.float64)


def token_logprobs(table: Tensor) -> Tensor:
    """``(41,)`` log-probability of every token of every response, given those before it."""
    return table.log_softmax(dim=1)[STATES, CHOICES]


def by_response(values: Tensor) -> Tensor:
    """``(15,)`` sum of a value of each token over its response."""
    return torch.zeros(len(STRINGS), dtype=values.dtype).index_add(0, RESPONSES, values)


def probabilities(table: Tensor) -> Tensor:
    """``(15,)`` of the responses; they sum to 1."""
    return by_response(token_logprobs(table)).exp()


def reward_to_go(values: Tensor) -> Tensor:
    """``(41,)``: the sum of a value over a token and all that follow in its response."""
    return torch.cat([part.flip(0).cumsum(0).flip(0) for part in values.split(LENGTHS.tolist())])


def tokens_of(logprobs: Tensor, responses: Tensor, entropy: Tensor | None = None) -> TokenLogprobs:
    """What a policy says; which tokens are greedy does not matter here."""
    greedy = torch.zeros_like(responses, dtype=torch.bool)
    return TokenLogprobs(logprobs, greedy, responses, int(responses.max()) + 1, entropy)


def all_strings(table: Tensor, reference: Tensor, advantages: Tensor) -> RolloutTokens[Tensor]:
    """Every response once, each token counted."""
    return RolloutTokens(
        logprobs=token_logprobs(table).detach(),
        ref_logprobs=token_logprobs(reference),
        advantages=advantages,
        counted=torch.ones(len(STATES), dtype=torch.bool),
    )


def random_rollout(
    lengths: tuple[int, ...] = (5, 1, 7, 3, 4), seed: int = 0
) -> tuple[Tensor, Tensor, RolloutTokens[Tensor]]:
    """Log-probabilities of a policy that has moved, responses, and columns; two are masked."""
    generator = torch.Generator().manual_seed(seed)
    responses = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(len(responses), generator=generator)

    old = -normal(2.0).abs() - 1
    rollout = RolloutTokens(
        logprobs=old,
        ref_logprobs=old + normal(0.3),
        advantages=normal(1.0),
        counted=(responses != 1) & (responses != 3),
        values=normal(1.0),
        returns=normal(1.0),
    )
    return old + normal(0.3), responses, rollout


def spoiled(values: Tensor, counted: Tensor) -> Tensor:
    """The same values, with NaN and infinities wherever nothing counts."""
    rubbish = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e30])
    filling = rubbish.to(values.dtype).repeat(len(values))[: len(values)]
    return torch.where(counted, values.detach(), filling)


def spoiled_rollout(rollout: RolloutTokens[Tensor]) -> RolloutTokens[Tensor]:
    """The same columns, all but ``counted`` spoiled."""
    counted = rollout.counted
    return rollout.map(
        lambda column: column if column.dtype == torch.bool else spoiled(column, counted)
    )
