"""Packed attention inside any transformers decoder, through its attention interface.

``packed_hidden_states`` is the one way from a packed row to hidden states. The backend is chosen
once, when a model is built, and recorded; nothing falls back silently.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from helpsteer2.data.packing import PackedBatch
from helpsteer2.errors import UserError
from helpsteer2.models.attention import flash, flex, sdpa

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Backend = Literal["sdpa", "flex", "flash"]
AttentionChoice = Literal["auto", "sdpa", "flex", "flash"]

logger = logging.getLogger(__name__)

# transformers looks for "sdpa", "flash" and "flex" inside names and would treat ours as its own.
_NAMES: dict[Backend, str] = {
    "sdpa": "packed_segments",
    "flex": "packed_blocks",
    "flash": "packed_varlen",
}
_BACKENDS = {name: backend for backend, name in _NAMES.items()}
# Arguments that decoders hand to their attention function and that change nothing here.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions"}


class AttentionContext(Protocol):
    """How the tokens of one row attend; shared by the attention of every layer."""

    def attend(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attention of one layer.

        Args:
            layer: The decoder's attention module.
            query: ``(1, H, T, D)``.
            key: ``(1, Hkv, T, D)``, of the same dtype.
            value: Like ``key``.
            scale: Factor of the scores before the softmax.
            window: A query sees keys less than ``window`` positions behind its own; None for all.

        Returns:
            ``(1, T, H, D)``.
        """
        ...


@dataclass(frozen=True)
class PackedContext:
    """What the attention of every layer shares for one packed batch."""

    batch: PackedBatch

    def attend(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attention of one layer by its backend; see ``AttentionContext``."""
        backend = _BACKENDS[layer.config._attn_implementation]  # type: ignore[union-attr, index]
        if backend == "sdpa":
            return sdpa.attention(query, key, value, self.batch.layout, scale, window)
        if backend == "flex":
            return flex.attention(query, key, value, self.flex_masks, scale, window)
        table, call = self.varlen_table, flash.kernel()
        assert call is not None  # choose_backend refused otherwise
        return flash.attention(query, key, value, table, scale, window, call)

    @cached_property
    def flex_masks(self) -> flex.FlexMasks:
        """Block masks, built at the first layer that asks."""
        return flex.FlexMasks(self.batch)

    @cached_property
    def varlen_table(self) -> flash.VarlenTable:
        """Segment table of the flash kernels, built at the first layer that asks."""
        return flash.VarlenTable.build(self.batch.layout, self.batch.input_ids.device)


def choose_backend(
    choice: AttentionChoice, device: torch.device | str, dtype: torch.dtype
) -> Backend:
    """The backend that a model on a device will use.

    Args:
        choice: ``auto`` takes ``sdpa`` on the CPU; on a GPU ``flash`` if there is a kernel and the
            dtype is one it takes, else ``flex``.
        device: Where the model will run.
        dtype: What attention computes in: autocast's, or else that of the weights.

    Returns:
        The backend, also said in the log.

    Raises:
        UserError: If the backend asked for cannot run there.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise UserError(
            f"attention: no backend runs on {kind!r} devices: use a CUDA GPU or the CPU "
            "(trainer.accelerator=cpu)"
        )
    on_gpu, half = kind == "cuda", dtype in flash.DTYPES
    if choice == "auto":
        backend: Backend = "sdpa" if not on_gpu else "flash" if half and flash.kernel() else "flex"
    else:
        backend = choice
    if backend == "sdpa" and on_gpu:
        raise UserError("attention: sdpa runs on the CPU; on a GPU choose auto, flash or flex")
    if backend != "sdpa" and not on_gpu:
        raise UserError(f"attention: {backend} needs a GPU; on the CPU choose auto or sdpa")
    if backend == "flash" and flash.kernel() is None:
        raise UserError(
            "attention: flash needs flash-attn (pip install 'helpsteer2[flash]' "
            "--no-build-isolation) or a torch with torch.nn.attention.varlen, and a GPU of compute "
            "capability 8 or more; choose flex otherwise"
        )
    if backend == "flash" and not half:
        raise UserError(
            f"attention: flash kernels do not compute in {dtype}: set trainer.precision=bf16-mixed "
            "(for scoring dtype=bfloat16), or choose auto or flex"
        )
    logger.info("attention backend: %s (asked for: %s)", backend, choice)
    return backend


def implementation_name(backend: Backend) -> str:
    """Name of a backend among transformers' attention implementations; registers it."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    name = _NAMES[backend]
    AttentionInterface.register(name, _packed_attention)
    AttentionMaskInterface.register(name, _no_mask)
    return name


@dataclass(frozen=True)
class _Window:
    """Stands where a mask tensor would: a sliding window of so many positions."""

    positions: int


def _no_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> _Window | None:
    """Packed rows need no mask tensor: the segment table is the mask, but for a window."""
    return None if local_size is None else _Window(local_size)


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | _Window | None,
    *,
    packed: AttentionContext | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls; q, k, v ``(1, H, T, D)``, out ``(1, T, H, D)``."""
    if packed is None:
        raise UserError(
            f"{type(module).__name__} got no packed batch: call the model through "
            "packed_hidden_states; if that was done, this decoder does not hand arguments on to "
            "its attention: choose another backbone"
        )
    if isinstance(attention_mask, _Window):  # some decoders put it in the mask alone
        sliding_window, attention_mask = attention_mask.positions, None
    # Softcaps, sinks, masks, … would be ignored silently by a kernel that does not know them.
    strange = sorted(
        name
        for name, value in unknown.items()
        if value is not None and value is not False and name not in _HARMLESS
    )
    if attention_mask is not None:
        strange.append("attention_mask")
    if value.shape[-1] != query.shape[-1]:
        strange.append("values narrower or wider than keys")
    if not getattr(module, "is_causal", True):
        strange.append("two-way attention")
    if dropout and module.training:
        strange.append(f"attention dropout {dropout}")
    if strange:
        raise UserError(
            f"packed attention does not know {', '.join(strange)}, which "
            f"{type(module).__name__} asks for: this backbone cannot be used"
        )
    # Under bf16-mixed, rotary embedding leaves q and k in fp32 while v is bf16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed.attend(module, query, key, value, scale, sliding_window), None


def check_architecture(config: PreTrainedConfig) -> None:
    """Refuse, before any weight is made, what is no decoder of text on the attention interface.

    Args:
        config: The model's config.

    Raises:
        UserError: For models of more than text, and for those outside the attention interface:
            transformers would fail on them somewhere inside.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.get_text_config() is not config:
        raise UserError(
            f"{config.model_type} has parts beside its text decoder: choose a backbone of text "
            "alone (Llama, Qwen, Mistral, … work)"
        )
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is not None and not model_class._supports_attention_backend:
        raise UserError(_outside_interface(model_class.__name__))


def check_packable(model: PreTrainedModel) -> None:
    """Refuse an architecture whose layers do not all go through the attention interface.

    Args:
        model: A decoder without LM head.

    Raises:
        UserError: For layers that carry state along the row (Mamba, linear attention), chunked
            attention, encoders, or models outside transformers' attention interface. They would
            leak between responses.
    """
    config: PreTrainedConfig = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    strange = kinds - {"full_attention", "sliding_attention"}
    if strange:
        raise UserError(
            f"{type(model).__name__} has {', '.join(sorted(strange))} layers, which cannot be "
            "packed: choose a backbone of full or sliding attention"
        )
    if not model._supports_attention_backend or not getattr(config, "is_causal", True):
        raise UserError(_outside_interface(type(model).__name__))


def _outside_interface(name: str) -> str:
    return (
        f"{name} does not use transformers' attention interface as a causal decoder: choose "
        "another backbone (Llama, Qwen, Mistral, … work)"
    )


def check_span(
    config: PreTrainedConfig,
    span: int,
    limits: str = "lengths.max_prompt_tokens and lengths.max_response_tokens",
) -> None:
    """Refuse texts beyond learned positions, and those that would share a rotary scale in a row.

    Args:
        config: Of the decoder.
        span: Tokens of the longest prompt with its response.
        limits: Settings that say how long the texts may be, for the message.

    Raises:
        UserError: If the backbone's positions do not allow that length.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    learned = None if rope else getattr(config, "max_position_embeddings", None)
    if learned is not None and span > learned:
        raise UserError(
            f"the backbone has positions for {learned} tokens, and a prompt with its response "
            f"takes {span}: lower {limits}"
        )
    variants = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for variant in variants:
        if variant.get("rope_type") in {"dynamic", "longrope"}:
            original = variant.get("original_max_position_embeddings")
            limit = original or getattr(config, "original_max_position_embeddings", None)
            limit = limit or config.max_position_embeddings
            if span > limit:
                raise UserError(
                    f"rope_type {variant['rope_type']} scales with the longest text of a batch "
                    f"beyond {limit} tokens, and a prompt with its response takes {span}: lower "
                    f"{limits}"
                )


def packed_hidden_states(backbone: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Hidden states of the last layer for every token of a packed row.

    Args:
        backbone: Decoder without LM head, built with a packed attention implementation.
        batch: The packed row, on the backbone's device.

    Returns:
        ``(T, H)``, after the final norm.

    Raises:
        UserError: If the backbone's positions do not allow these lengths.
    """
    check_span(backbone.config.get_text_config(), batch.layout.max_span)
    return row_hidden_states(backbone, batch.input_ids, batch.position_ids, PackedContext(batch))


def row_hidden_states(
    backbone: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, context: AttentionContext
) -> Tensor:
    """Hidden states of the last layer for a row whose tokens attend as the context says.

    Args:
        backbone: Decoder without LM head, built with a packed attention implementation.
        input_ids: ``(T,)`` int64, on the backbone's device.
        position_ids: ``(T,)`` int64.
        context: Attention of every layer.

    Returns:
        ``(T, H)``, after the final norm.
    """
    output = backbone(
        input_ids=input_ids.unsqueeze(0),
        position_ids=position_ids.unsqueeze(0),
        use_cache=False,
        packed=context,
    )
    return output.last_hidden_state.squeeze(0)  # type: ignore[no-any-return]
