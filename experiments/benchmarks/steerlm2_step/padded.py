"""What a careful user writes with plain transformers: every response a row with its prompt.

No part of it knows of this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Setting:
    """How the rows go through the model.

    Attributes:
        rows: Most rows of one forward pass.
        careful: Rows are sorted by length, there is no mask (behind right-hand padding a causal
            mask is enough, and transformers then takes its fast path), and the LM head reads the
            places alone that predict a token of a response. Otherwise rows keep their order, the
            padding is masked, and all logits are made.
        two_passes: In training, the weights b' come from a pass without gradient over all rows, as
            in NeMo-Aligner; rows of different prompts then share the passes with gradient.
            Otherwise the rows of a prompt go forward, in as many passes as they need, before there
            is one backward pass of its loss.
    """

    rows: int
    careful: bool = True
    two_passes: bool = False


@dataclass(frozen=True)
class Row:
    """A prompt and one response.

    Attributes:
        ids: ``(L,)`` int64.
        n_prompt: Tokens of the prompt, with its label.
    """

    ids: Tensor
    n_prompt: int


@dataclass(frozen=True)
class Prompt:
    """A prompt with n responses, and what is known of them.

    Attributes:
        rows: One a response.
        ref_logprobs: ``(n,)`` nats, what the proposal gives each response.
        log_targets: ``(n,)`` nats, log P(a|x,y) + log P(y|x).
    """

    rows: Sequence[Row]
    ref_logprobs: Tensor
    log_targets: Tensor

    @property
    def weights(self) -> Tensor:
        """w' ``(n,)``, what they should be."""
        return (self.log_targets - self.ref_logprobs).softmax(0)

    def distance(self, logprobs: Tensor) -> Tensor:
        """``Σ w' log(w'/b')`` of the policy's log-probabilities ``(n,)``."""
        log_policy = (logprobs - self.ref_logprobs).log_softmax(0)
        return (self.weights * (self.weights.log() - log_policy)).sum()


@dataclass
class Count:
    """Tokens that went through the layers, and those of them that were no padding."""

    executed: int = 0
    real: int = 0


def token_logprobs(model: Any, rows: Sequence[Row], setting: Setting, count: Count) -> list[Tensor]:
    """Log-probabilities of the response tokens of some rows, in one forward pass each batch.

    Args:
        model: A causal LM of the Llama kind.
        rows: The rows.
        setting: How they go through the model.
        count: Added to.

    Returns:
        For each row, in the order given, its response's ``(m,)`` in nats.
    """
    found: dict[int, Tensor] = {}
    for members in _batches(rows, setting):
        chosen = [rows[i] for i in members]
        found.update(zip(members, _batch_logprobs(model, chosen, setting.careful), strict=True))
        lengths = [len(row.ids) for row in chosen]
        count.executed += len(lengths) * max(lengths)
        count.real += sum(lengths)
    return [found[i] for i in range(len(rows))]


def _batches(rows: Sequence[Row], setting: Setting) -> Iterator[list[int]]:
    """Numbers of the rows of each batch, longest first if sorted."""
    order = list(range(len(rows)))
    if setting.careful:
        order.sort(key=lambda i: -len(rows[i].ids))
    for start in range(0, len(order), setting.rows):
        yield order[start : start + setting.rows]


def _batch_logprobs(model: Any, rows: Sequence[Row], careful: bool) -> list[Tensor]:
    ids = pad_sequence([row.ids for row in rows], batch_first=True)
    places = torch.arange(ids.shape[1])
    ends = torch.tensor([len(row.ids) for row in rows])[:, None]
    starts = torch.tensor([row.n_prompt for row in rows])[:, None]
    predicts = (places >= starts - 1) & (places < ends - 1)
    answers = ids[:, 1:][predicts[:, :-1]]
    if careful:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[predicts])
        logprobs = -F.cross_entropy(logits, answers, reduction="none")
    else:
        mask = (places < ends).long()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        every = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        logprobs = every[predicts[:, :-1]]
    return list(logprobs.split([len(row.ids) - row.n_prompt for row in rows]))


def backward(model: Any, prompts: Sequence[Prompt], setting: Setting, count: Count) -> float:
    """Gradient of the mean distance of some prompts, added to what is there.

    Args:
        model: A causal LM.
        prompts: All prompts of an optimizer step.
        setting: How their rows go through the model.
        count: Added to.

    Returns:
        The mean distance, in nats.
    """
    if setting.two_passes:
        return _two_passes(model, prompts, setting, count)
    total = 0.0
    for prompt in prompts:
        (sums,) = _by_prompt([prompt], token_logprobs(model, prompt.rows, setting, count))
        loss = prompt.distance(sums) / len(prompts)
        loss.backward()
        total += float(loss.detach())
    return total


def _two_passes(model: Any, prompts: Sequence[Prompt], setting: Setting, count: Count) -> float:
    """b' first, then the gradient as the paper writes it: that of Σ (b' − w') log Q."""
    rows = [row for prompt in prompts for row in prompt.rows]
    with torch.no_grad():
        sums = _by_prompt(prompts, token_logprobs(model, rows, setting, count))
    factors, total = [], 0.0
    for prompt, own in zip(prompts, sums, strict=True):
        total += float(prompt.distance(own)) / len(prompts)
        policy = (own - prompt.ref_logprobs).softmax(0)
        factors.append((policy - prompt.weights) / len(prompts))
    flat = torch.cat(factors)
    for members in _batches(rows, setting):
        chosen = [rows[i] for i in members]
        parts = token_logprobs(model, chosen, setting, count)
        of_rows = torch.stack([part.sum() for part in parts])
        (flat[members] * of_rows).sum().backward()
    return total


def _by_prompt(prompts: Sequence[Prompt], parts: Sequence[Tensor]) -> list[Tensor]:
    """Sums over tokens: for each prompt ``(n,)``, added up in fp64 as thousands of nats need."""
    sums = torch.stack([part.double().sum() for part in parts]).float()
    return list(sums.split([len(prompt.rows) for prompt in prompts]))
