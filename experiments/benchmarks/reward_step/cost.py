"""What a training step costs: model sizes, and the FLOPs and tokens of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from helpsteer2.data.packing import PackedLayout

VOCABULARY = 8192


@dataclass(frozen=True)
class Size:
    """A Llama from scratch.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        layers: Number of layers.
        heads: Query heads, and as many key heads.
        groups_per_step: Groups (pairs) of one optimizer step.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups_per_step: int

    def config(self) -> dict[str, Any]:
        """The transformers config."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": 1024,
            "vocab_size": VOCABULARY,
        }

    @property
    def linear_shapes(self) -> dict[tuple[int, int], int]:
        """Shapes (in, out) of the matrices of all layers, and how many there are of each."""
        h, i = self.hidden, self.intermediate
        return {(h, h): 4 * self.layers, (h, i): 2 * self.layers, (i, h): self.layers}

    @property
    def linear_parameters(self) -> int:
        """N, the weights that every token is multiplied with: no embedding, no norms, no head."""
        return sum(a * b * count for (a, b), count in self.linear_shapes.items())


SIZES = {
    "XS": Size(hidden=32, intermediate=88, layers=2, heads=2, groups_per_step=16),
    "S": Size(hidden=256, intermediate=688, layers=4, heads=4, groups_per_step=32),
    "M": Size(hidden=512, intermediate=1376, layers=8, heads=8, groups_per_step=16),
}
"""XS is for trying the benchmark itself."""


def training_flops(size: Size, tokens: int, attended: int, recomputed: bool = False) -> float:
    """FLOPs of forward and backward.

    Linear layers: ``6·N·T``, that is 2 a weight and token forward, and twice as many backward.
    Attention: ``12·h·P`` a layer, that is 2 products of 2·h a (query, key) pair forward, and twice
    as many backward; what fused kernels compute again in their backward is not counted. Embedding,
    head, norms, rotary embedding and the optimizer are left out.

    Args:
        size: The model.
        tokens: T, tokens that go through the layers.
        attended: P, (query, key) pairs.
        recomputed: Count the forward twice, as gradient checkpointing runs it.

    Returns:
        Floating-point operations, a multiplication and an addition counted as two.
    """
    forward = 2.0 * size.linear_parameters * tokens
    forward += 4.0 * size.hidden * size.layers * attended
    return forward * (4 if recomputed else 3)


def packed_pairs(layout: PackedLayout) -> int:
    """(query, key) pairs of a packed row: causal in prompts and responses, responses × prompt."""
    pairs = 0
    for prompt, responses in zip(layout.prompt_lengths, layout.response_lengths, strict=True):
        pairs += _causal(prompt) + sum(_causal(r) + r * prompt for r in responses)
    return pairs


@dataclass
class Tally:
    """What went through a model during one step.

    Attributes:
        groups: Groups (pairs).
        rows: Micro-batches.
        real_tokens: Tokens of prompt and response summed over responses: what a model without
            prompt sharing has to read at the least.
        executed_tokens: Tokens that went through the layers, padding included.
        model_flops: FLOPs of the tokens without padding and without recomputation; causal
            attention counts its own half.
        executed_flops: FLOPs with padding, full attention squares and recomputation.
    """

    groups: int = 0
    rows: int = 0
    real_tokens: int = 0
    executed_tokens: int = 0
    model_flops: float = 0.0
    executed_flops: float = 0.0

    def add_packed(self, size: Size, layout: PackedLayout) -> None:
        """Count a packed row: each prompt once, nothing padded."""
        self.groups += len(layout.prompt_lengths)
        self.rows += 1
        for prompt, responses in zip(layout.prompt_lengths, layout.response_lengths, strict=True):
            self.real_tokens += sum(prompt + response for response in responses)
        self.executed_tokens += layout.n_tokens
        flops = training_flops(size, layout.n_tokens, packed_pairs(layout))
        self.model_flops += flops
        self.executed_flops += flops

    def add_padded(
        self, size: Size, lengths: Sequence[int], padded_to: int, recomputed: bool
    ) -> None:
        """Count a padded batch of pairs: one row a response, each with its prompt."""
        executed = len(lengths) * padded_to
        self.groups += len(lengths) // 2
        self.rows += 1
        self.real_tokens += sum(lengths)
        self.executed_tokens += executed
        self.model_flops += training_flops(size, sum(lengths), sum(map(_causal, lengths)))
        self.executed_flops += training_flops(size, executed, executed * padded_to, recomputed)


def _causal(length: int) -> int:
    return length * (length + 1) // 2
