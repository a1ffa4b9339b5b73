"""Packed attention with shared prompts: backends, and their way into transformers' decoders."""

from helpsteer2.models.attention.interface import (
    AttentionChoice,
    AttentionContext,
    Backend,
    PackedContext,
    check_architecture,
    check_packable,
    check_span,
    choose_backend,
    implementation_name,
    packed_hidden_states,
    row_hidden_states,
)

__all__ = [
    "AttentionChoice",
    "AttentionContext",
    "Backend",
    "PackedContext",
    "check_architecture",
    "check_packable",
    "check_span",
    "choose_backend",
    "implementation_name",
    "packed_hidden_states",
    "row_hidden_states",
]
