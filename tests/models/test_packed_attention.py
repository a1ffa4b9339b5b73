"""Packed rows with shared prompts give what plain transformers gives without packing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel

from helpsteer2.data.packing import pack
from helpsteer2.errors import UserError
from helpsteer2.models.attention import (
    check_architecture,
    check_packable,
    choose_backend,
    flash,
    flex,
)
from helpsteer2.models.attention.interface import PackedContext, implementation_name
from helpsteer2.models.attention.sdpa import attention as sdpa_attention

from .packed_reference import (
    SIZES,
    gradients,
    last_states_one_by_one,
    last_states_packed,
    last_states_padded,
    make_groups,
    relative_error,
    twins,
)

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    # Windows shorter than the prompts: a response sees only the end of its prompt.
    "mistral": {"sliding_window": 16},
    "gemma3_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    # Tells the window by its mask alone, not by an argument.
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    # Learned positions.
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
GROUPS = {"one": [1, 1, 1], "pairs": [2, 2, 2], "ten": [10, 10], "mixed": [1, 10, 2]}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("responses", GROUPS.values(), ids=GROUPS.keys())
def test_packed_equals_padded_equals_one_by_one(decoder: str, responses: list[int]) -> None:
    packed_model, plain_model = twins(decoder, **DECODERS[decoder])
    groups = make_groups(responses)
    packed = last_states_packed(packed_model, pack(groups))
    single = last_states_one_by_one(plain_model, groups)
    padded = last_states_padded(plain_model, groups)
    torch.testing.assert_close(packed, single, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(packed_model, packed), gradients(plain_model, single)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert relative_error(ours[name], theirs[name]) < 1e-4, name


def test_one_token_segments_and_long_prompts() -> None:
    packed_model, plain_model = twins("llama")
    groups = make_groups([3, 1], prompt=300)
    shortest = groups[0].response_ids[0][:1]
    groups[0] = type(groups[0])(
        groups[0].prompt_ids, (shortest, *groups[0].response_ids[1:]), groups[0].attributes, 0.0, 0
    )
    packed = last_states_packed(packed_model, pack(groups))
    torch.testing.assert_close(
        packed, last_states_one_by_one(plain_model, groups), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("decoder", DECODERS)
def test_responses_cannot_see_each_other(decoder: str) -> None:
    model, _ = twins(decoder, **DECODERS[decoder])
    groups = make_groups([3, 2])
    before = last_states_packed(model, pack(groups))
    changed = list(groups[0].response_ids)
    changed[1] = (changed[1] % 90 + 3).astype(np.int32)
    groups[0] = type(groups[0])(groups[0].prompt_ids, tuple(changed), groups[0].attributes, 0.0, 0)
    after = last_states_packed(model, pack(groups))
    others = [0, 2, 3, 4]
    assert torch.equal(before[others], after[others])
    assert not torch.allclose(before[1], after[1])


def test_order_and_company_of_groups_change_nothing() -> None:
    model, _ = twins("llama")
    groups = make_groups([2, 3, 1])
    together = last_states_packed(model, pack(groups))
    turned = last_states_packed(model, pack(groups[::-1]))
    torch.testing.assert_close(together[:2], turned[-2:], atol=1e-5, rtol=1e-5)
    alone = torch.cat([last_states_packed(model, pack([group])) for group in groups])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decoder", DECODERS)
def test_padding_changes_nothing(decoder: str) -> None:
    model, _ = twins(decoder, **DECODERS[decoder])
    groups = make_groups([2, 3])
    plain = last_states_packed(model, pack(groups))
    padded = last_states_packed(model, pack(groups, 64))
    torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-5)
    theirs = gradients(model, plain)
    for name, gradient in gradients(model, padded).items():
        assert relative_error(gradient, theirs[name]) < 1e-5, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_autocast_stays_near_fp32(checkpointing: bool) -> None:
    # Rotary embedding leaves q and k in fp32 and v in bf16 here. bf16 has 8 bits: 2^-8 = .004 a
    # rounding; a wrong backward would be off by order 1.
    packed_model, plain_model = twins("llama", initializer_range=0.1)
    if checkpointing:
        packed_model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = make_groups([2, 5])
    with torch.autocast("cpu", torch.bfloat16):
        packed = last_states_packed(packed_model, pack(groups))
    ours = gradients(packed_model, packed.float())
    reference = last_states_one_by_one(plain_model, groups)
    theirs = gradients(plain_model, reference)
    assert relative_error(packed.float(), reference) < 0.02
    for name in theirs:
        assert relative_error(ours[name], theirs[name]) < 0.08, name


def _random_qkv(tokens: int, heads: int = 4, key_heads: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(1, tokens, h, 8).transpose(1, 2).requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]


@pytest.mark.parametrize("window", [None, 9])
def test_flex_mask_is_the_mask_of_the_segment_table(window: int | None) -> None:
    batch = pack(make_groups([2, 1, 3]))
    tokens = batch.layout.n_tokens
    function = flex.mask_function(batch, window)
    index = torch.arange(tokens)
    mask = function(index, index, index[:, None], index[None])
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, prompt, responses in zip(
        batch.layout.group_starts, batch.layout.prompt_lengths, batch.layout.response_lengths,
        strict=False,
    ):  # fmt: skip
        rows = [range(start, start + prompt)]
        at = start + prompt
        for length in responses:
            rows.append([*range(start, start + prompt), *range(at, at + length)])
            at += length
        for row in rows:
            for (i, query), (j, key) in itertools.product(enumerate(row), repeat=2):
                allowed[query, key] = j <= i and (window is None or i - j < window)
    assert torch.equal(mask, allowed)


@pytest.mark.parametrize("window", [None, 9])
def test_flex_forward_equals_sdpa(window: int | None) -> None:
    batch = pack(make_groups([2, 1, 3]))
    q, k, v = (t.detach() for t in _random_qkv(batch.layout.n_tokens))
    ours = flex.attention(q, k, v, flex.FlexMasks(batch), 0.3, window)
    theirs = sdpa_attention(q, k, v, batch.layout, 0.3, window)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def _plain_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    table: flash.VarlenTable, scale: float, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """What a flash kernel computes: each segment causal, aligned to the bottom right."""
    outputs = []
    offsets = zip(table.query_offsets.tolist(), table.key_offsets.tolist(), strict=True)
    for (q0, k0), (q1, k1) in itertools.pairwise(offsets):
        queries, keys = q1 - q0, k1 - k0
        behind = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
        mask = (behind >= 0) & (behind < (window or keys))
        out = F.scaled_dot_product_attention(
            q[None, q0:q1].transpose(1, 2), k[None, k0:k1].transpose(1, 2),
            v[None, k0:k1].transpose(1, 2), attn_mask=mask, scale=scale, enable_gqa=True,
        )  # fmt: skip
        outputs.append(out.transpose(1, 2)[0])
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 9])
def test_flash_gather_equals_sdpa_with_gradients(window: int | None) -> None:
    batch = pack(make_groups([2, 1, 10]))
    inputs = _random_qkv(batch.layout.n_tokens)
    table = flash.VarlenTable.build(batch.layout, torch.device("cpu"))
    ours = flash.attention(*inputs, table, 0.3, window, _plain_varlen)  # type: ignore[arg-type]
    theirs = sdpa_attention(*inputs, batch.layout, 0.3, window)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu")
@pytest.mark.parametrize("backend", ["flash", "flex"])
@pytest.mark.parametrize("responses", GROUPS.values(), ids=GROUPS.keys())
def test_gpu_backends_equal_fp32_cpu(backend: str, responses: list[int]) -> None:
    sizes = {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.1}
    reference_model, _ = twins("llama", **sizes)
    batch = pack(make_groups(responses, prompt=200))
    reference = last_states_packed(reference_model, batch)
    theirs = gradients(reference_model, reference)
    config = reference_model.config
    model = AutoModel.from_config(config, attn_implementation=implementation_name(backend))  # type: ignore[arg-type]
    model.load_state_dict(reference_model.state_dict())
    model.cuda().train()
    with torch.autocast("cuda", torch.bfloat16):
        states = last_states_packed(model, batch.to("cuda"))
    assert relative_error(states.float().cpu(), reference) < 0.02
    ours = gradients(model, states.float().cpu())
    for name in theirs:
        assert relative_error(ours[name].cpu(), theirs[name]) < 0.08, name


def test_unknown_attention_arguments_are_refused() -> None:
    # Gemma 2 softcaps its scores; a kernel that does not know would ignore it silently.
    config = AutoConfig.for_model("gemma2", **SIZES, query_pre_attn_scalar=8)
    model = AutoModel.from_config(config, attn_implementation=implementation_name("sdpa"))
    with pytest.raises(UserError, match="softcap"):
        last_states_packed(model, pack(make_groups([1])))


def test_a_packed_model_cannot_be_called_without_a_packed_batch() -> None:
    model, _ = twins("llama")
    with pytest.raises(UserError, match="packed_hidden_states"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_layers_with_state_are_refused() -> None:
    config = AutoConfig.for_model(
        "qwen3_next", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=16, vocab_size=50, num_experts=2,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    with pytest.raises(UserError, match="linear_attention"):
        check_packable(model)


def test_rope_that_reads_the_longest_text_is_refused_beyond_its_length() -> None:
    model, _ = twins(
        "llama",
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    short = make_groups([1], prompt=10)
    assert last_states_packed(model, pack(short)).isfinite().all()
    with pytest.raises(UserError, match="dynamic"):
        last_states_packed(model, pack(make_groups([1], seed=3, prompt=900)))


def test_texts_beyond_learned_positions_are_refused() -> None:
    model, _ = twins("gpt2", **{**DECODERS["gpt2"], "max_position_embeddings": 64})
    assert last_states_packed(model, pack(make_groups([2], prompt=10))).isfinite().all()
    with pytest.raises(UserError, match="positions for 64 tokens"):
        last_states_packed(model, pack(make_groups([1], seed=3, prompt=900)))


@pytest.mark.parametrize(
    ("decoder", "options", "what"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "two-way attention"),
        (
            "deepseek_v3",
            {
                "kv_lora_rank": 8,
                "q_lora_rank": 8,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
                "first_k_dense_replace": 2,
                "num_key_value_heads": 4,
            },
            "narrower or wider",
        ),
    ],
)
def test_attention_that_the_backends_cannot_do_is_refused(
    decoder: str, options: dict[str, Any], what: str
) -> None:
    config = AutoConfig.for_model(decoder, **{**SIZES, **options})
    model = AutoModel.from_config(config, attn_implementation=implementation_name("sdpa"))
    with pytest.raises(UserError, match=what):
        last_states_packed(model, pack(make_groups([1])))


def test_backends_that_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", "cpu", torch.float32) == "sdpa"
    for backend in ("flash", "flex"):
        with pytest.raises(UserError, match="needs a GPU"):
            choose_backend(backend, "cpu", torch.bfloat16)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="runs on the CPU"):
        choose_backend("sdpa", "cuda", torch.bfloat16)
    with pytest.raises(UserError, match="'mps'"):
        choose_backend("auto", "mps", torch.float32)
    monkeypatch.setattr(flash, "kernel", lambda: _plain_varlen)
    assert choose_backend("auto", "cuda", torch.bfloat16) == "flash"
    assert choose_backend("auto", "cuda", torch.float32) == "flex"
    with pytest.raises(UserError, match=r"do not compute in torch\.float32"):
        choose_backend("flash", "cuda", torch.float32)
    monkeypatch.setattr(flash, "kernel", lambda: None)
    assert choose_backend("auto", "cuda", torch.bfloat16) == "flex"
    with pytest.raises(UserError, match="flash-attn"):
        choose_backend("flash", "cuda", torch.bfloat16)


def test_block_masks_are_built_once_a_batch() -> None:
    context = PackedContext(pack(make_groups([2])))
    assert context.flex_masks[None] is context.flex_masks[None]
    assert context.varlen_table is context.varlen_table


@pytest.mark.parametrize(
    ("model_type", "what"),
    [("gptj", "attention interface"), ("gemma3", "beside its text decoder"), ("mamba", "Mamba")],
)
def test_an_architecture_that_cannot_be_packed_is_refused_before_it_is_built(
    model_type: str, what: str
) -> None:
    with pytest.raises(UserError, match=what):
        check_architecture(AutoConfig.for_model(model_type))
