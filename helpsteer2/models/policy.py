"""The policy: a causal LM that tells how likely the responses of a packed row are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from helpsteer2.data.packing import PackedBatch, ResponseTokens
from helpsteer2.errors import UserError
from helpsteer2.functional.logprobs import TokenLogprobs, chunked_logprobs
from helpsteer2.models.attention import AttentionChoice, packed_hidden_states
from helpsteer2.models.policy_export import PolicySpec, write_policy
from helpsteer2.models.policy_loading import load_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpsteer2.data.chat import BoundChat


class Policy(nn.Module):
    """Log-probabilities of response tokens, from hidden states and without the T×V logits.

    Args:
        causal_lm: Decoder and LM head, built with a packed attention implementation.
        spec: What the ids mean beside the weights.

    Raises:
        UserError: If the logits are not a linear layer of the hidden states alone.
    """

    def __init__(self, causal_lm: PreTrainedModel, spec: PolicySpec) -> None:
        super().__init__()
        _check_logits_are_linear(causal_lm)
        self.causal_lm = causal_lm
        self.spec = spec

    @property
    def backbone(self) -> PreTrainedModel:
        """The decoder without LM head."""
        return self.causal_lm.base_model  # type: ignore[return-value]

    @property
    def lm_head(self) -> nn.Linear:
        """The layer from hidden states to logits; its weight may be that of the embedding."""
        return self.causal_lm.get_output_embeddings()  # type: ignore[return-value]

    def response_logprobs(self, batch: PackedBatch, entropy: bool = False) -> TokenLogprobs:
        """Log-probability of every response token of a packed row, given all before it.

        The first token of each response is predicted by the last one of its prompt.

        Args:
            batch: G groups with R responses, on the model's device.
            entropy: Whether to compute the entropies as well.

        Returns:
            The N response tokens, response after response, in float32 nats whatever the dtype of
            the weights or the autocast around.
        """
        return self._token_logprobs(batch, batch.layout.response_tokens, entropy)

    def learned_logprobs(self, batch: PackedBatch) -> TokenLogprobs:
        """Log-probability of every token that supervised fine-tuning learns, in one pass.

        Args:
            batch: G groups with R responses, on the model's device.

        Returns:
            The N response tokens as ``response_logprobs`` gives them, then the learned tokens of
            the prompts, each of which counts as one of the first response to its prompt.
        """
        return self._token_logprobs(batch, batch.layout.learned_tokens)

    def _token_logprobs(
        self, batch: PackedBatch, tokens: ResponseTokens, entropy: bool = False
    ) -> TokenLogprobs:
        """Log-probability of some tokens of a packed row."""
        device = batch.input_ids.device
        positions, predictors, responses = (
            torch.from_numpy(indices).to(device, non_blocking=True)
            for indices in (tokens.positions, tokens.predictors, tokens.responses)
        )
        hidden = packed_hidden_states(self.backbone, batch)[predictors]
        head = self.lm_head
        logprobs, greedy, entropies = chunked_logprobs(
            hidden, head.weight, batch.input_ids[positions], head.bias, entropy=entropy
        )
        return TokenLogprobs(logprobs, greedy, responses, batch.layout.n_responses, entropies)

    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Export as a plain transformers causal LM with tokenizer and chat template.

        Adapters are merged into it; if others can load their base, they also lie unmerged in the
        folder's ``adapter``.

        Args:
            folder: Where to; an older export there is replaced at the end, or not at all.
            tokenizer: The tokenizer that the spec was made with.

        Raises:
            UserError: If the folder cannot be written.
        """
        write_policy(folder, self.causal_lm, self.spec, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: AttentionChoice = "auto",
        device: torch.device | str = "cpu",
        base: str | Path | None = None,
    ) -> tuple[Policy, PreTrainedTokenizerBase, BoundChat]:
        """Load an export, its adapter alone, or any causal LM with a chat template.

        Args:
            path: Folder or Hub id. Without ``policy.json`` its own chat template is used.
            dtype: Of the weights.
            attention: Attention backend.
            device: Where the model shall run.
            base: Folder or Hub id of an adapter's base, if it has moved since the training.

        Returns:
            The policy in eval mode with every dropout 0, its tokenizer and its chat format.

        Raises:
            UserError: If the folder is no policy that could be trusted; the message says why.
        """
        causal_lm, spec, tokenizer = load_policy(path, dtype, attention, device, base)
        return cls(causal_lm, spec).to(device).eval(), tokenizer, spec.chat


class _Output:
    """Stands for a decoder's output: hidden states, and None for whatever else it may hold."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


@torch.no_grad()
def _check_logits_are_linear(causal_lm: PreTrainedModel) -> None:
    """Refuse models that scale or cap their logits, by trying: they say so in many ways.

    The decoder is left out, so that this costs one product with the LM head.
    """
    name, head = type(causal_lm).__name__, causal_lm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{name} has no linear LM head: choose another backbone")
    generator = torch.Generator().manual_seed(0)
    # Large, so that a cap shows.
    hidden = 100 * torch.randn(1, 2, head.in_features, generator=generator)
    hidden = hidden.to(head.weight.device, head.weight.dtype)
    decoder = causal_lm.get_decoder()
    decoder.forward = lambda *args, **kwargs: _Output(hidden)
    try:
        ids = torch.zeros(1, 2, dtype=torch.int64, device=hidden.device)
        logits = causal_lm(input_ids=ids).logits
    finally:
        del decoder.forward  # the method of its class is there again
    if not torch.allclose(logits, head(hidden).to(logits.dtype), rtol=1e-2, atol=1e-2):
        raise UserError(
            f"{name} scales or caps its logits, which this project does not: choose another "
            "backbone (Llama, Qwen, Mistral, … work)"
        )
