"""A policy's log-probabilities are those of plain transformers, before and after its export."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.lengths import CutReport, LengthLimits
from helpsteer2.data.packing import PackedBatch, pack
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.data.tokenise import encode_group
from helpsteer2.data.tokenizer import PretrainedTokenizer, TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.attention import packed_hidden_states
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.export import push_to_hub
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec

from .packed_reference import SIZES, make_groups

Packed = Callable[[BoundChat], tuple[PackedBatch, list[list[int]]]]
MakePolicy = Callable[..., Policy]
TRAINED = TrainedTokenizer(300)


@pytest.fixture
def make_policy(tokenizer: PreTrainedTokenizerFast) -> MakePolicy:
    def make(model_type: str = "llama", chat: ChatFormat | None = None, **options: Any) -> Policy:
        known = AutoConfig.for_model(model_type).to_dict()
        sizes = {key: value for key, value in SIZES.items() if key in known}
        config = {**sizes, "vocab_size": 320, "model_type": model_type, **options}
        backbone = Backbone(TRAINED, init="random", config=config)
        causal_lm = backbone.build(tokenizer, seed=0, lm_head=True)
        bound = (chat or ChatFormat()).bind(tokenizer)
        return Policy(causal_lm, PolicySpec(bound, LengthLimits(64, 48), "random", "made-up rows"))

    return make


def plain_logprobs(model: Any, batch: PackedBatch, rows: list[list[int]], pad: int) -> Tensor:
    """``(N,)`` log-softmax of HF's own logits over right-padded single sequences."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logprobs = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(dim=-1)
    of_responses = []
    lengths = [m for responses in batch.layout.response_lengths for m in responses]
    for row, length, these in zip(rows, lengths, logprobs, strict=True):
        targets = torch.tensor(row[-length:])
        start = len(row) - length - 1
        of_responses.append(these[start : start + length].gather(1, targets[:, None]).squeeze(1))
    return torch.cat(of_responses)


def plain_model(policy: Policy, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Any:
    """The exported policy as plain transformers loads it."""
    policy.save_pretrained(folder, tokenizer)
    return AutoModelForCausalLM.from_pretrained(folder).train()


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("qwen3", {}),
        ("phi", {"tie_word_embeddings": False}),  # its LM head has a bias
    ],
)
def test_values_and_gradients_are_those_of_plain_transformers(
    model_type: str,
    options: dict[str, Any],
    make_policy: MakePolicy,
    tokenizer: PreTrainedTokenizerFast,
    packed: Packed,
    tmp_path: Path,
) -> None:
    policy = make_policy(model_type, **options)
    if policy.lm_head.bias is not None:
        torch.nn.init.normal_(policy.lm_head.bias)
    batch, rows = packed(policy.spec.chat)
    plain = plain_model(policy, tokenizer, tmp_path / "export")
    ours = policy.response_logprobs(batch).logprobs
    theirs = plain_logprobs(plain, batch, rows, tokenizer.pad_token_id)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    factors = torch.linspace(-1, 2, len(ours))
    (ours * factors).sum().backward()
    (theirs * factors).sum().backward()
    mine = dict(policy.causal_lm.named_parameters())
    assert mine.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        difference = (mine[name].grad - parameter.grad).norm()
        assert difference <= 1e-4 * parameter.grad.norm() + 1e-6, name


def test_each_response_is_predicted_from_its_own_prompt(make_policy: MakePolicy) -> None:
    batch = pack(make_groups([3, 1, 2]), multiple=64)
    tokens = batch.layout.response_tokens
    assert batch.layout.padding
    assert (batch.segment_ids[tokens.positions] > 0).all()
    assert len(tokens.positions) == int((batch.segment_ids > 0).sum())
    # The predictor stands one place before the token, in its prompt or in the same response.
    place = batch.position_ids
    assert torch.equal(place[tokens.predictors] + 1, place[tokens.positions])
    assert torch.equal(batch.group_ids[tokens.predictors], batch.group_ids[tokens.positions])
    kinds = batch.segment_ids[tokens.predictors]
    same = kinds == batch.segment_ids[tokens.positions]
    first = torch.from_numpy(tokens.responses).diff(prepend=torch.tensor([-1])) > 0
    assert torch.equal(same, ~first)
    assert (kinds[first] == 0).all()
    lengths = [m for responses in batch.layout.response_lengths for m in responses]
    assert torch.from_numpy(tokens.responses).bincount().tolist() == lengths


def test_other_groups_in_the_row_change_nothing(make_policy: MakePolicy) -> None:
    policy = make_policy()
    groups = make_groups([2, 3, 1])
    together = policy.response_logprobs(pack(groups, multiple=64)).logprobs
    alone = torch.cat([policy.response_logprobs(pack([group])).logprobs for group in groups])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_under_bf16_autocast_only_the_hidden_states_are_rounded(make_policy: MakePolicy) -> None:
    policy, batch = make_policy(), pack(make_groups([2, 2]))
    exact = policy.response_logprobs(batch).logprobs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = policy.response_logprobs(batch).logprobs
        hidden = packed_hidden_states(policy.backbone, batch)
    tokens = batch.layout.response_tokens
    logits = hidden[tokens.predictors].float() @ policy.lm_head.weight.T
    targets = batch.input_ids[tokens.positions]
    expected = logits.log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert 0 < (ours - exact).abs().max() < 0.5


def test_recomputed_layers_change_no_gradient(tokenizer: PreTrainedTokenizerFast) -> None:
    batch, gradients = pack(make_groups([2, 3])), []
    for recomputed in (False, True):
        config = {**SIZES, "vocab_size": 320, "model_type": "llama"}
        backbone = Backbone(
            TRAINED, init="random", config=config, gradient_checkpointing=recomputed
        )
        causal_lm = backbone.build(tokenizer, seed=0, lm_head=True)
        spec = PolicySpec(ChatFormat().bind(tokenizer), LengthLimits(64, 48), "random")
        policy = Policy(causal_lm, spec)
        assert policy.training
        policy.response_logprobs(batch).logprobs.square().sum().backward()
        gradients.append([p.grad for p in policy.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
    ],
)
def test_scaled_or_capped_logits_are_refused(
    model_type: str, options: dict[str, Any], make_policy: MakePolicy
) -> None:
    with pytest.raises(UserError, match="scales or caps its logits"):
        make_policy(model_type, **options)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2_moe", "olmo2", "gpt2", "opt"])
def test_linear_logits_are_taken_whatever_the_decoder(
    model_type: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    sizes = {
        **SIZES, "vocab_size": 320, "word_embed_proj_dim": 32, "n_embd": 32, "n_head": 4,
        "moe_intermediate_size": 8, "num_experts": 2, "shared_expert_intermediate_size": 8,
    }  # fmt: skip
    known = AutoConfig.for_model(model_type).to_dict()
    config = AutoConfig.for_model(model_type, **{k: v for k, v in sizes.items() if k in known})
    causal_lm = AutoModelForCausalLM.from_config(config)
    spec = PolicySpec(ChatFormat().bind(tokenizer), LengthLimits(64, 48), "random")
    policy = Policy(causal_lm, spec)
    assert "forward" not in vars(policy.causal_lm.get_decoder())


def test_the_folder_is_a_plain_causal_lm(
    make_policy: MakePolicy, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    policy = make_policy(chat=ChatFormat(system_prompt="Be brief."))
    plain_model(policy, tokenizer, tmp_path / "export")
    folder = tmp_path / "export"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "packed" not in json.dumps(config)
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert generation.pad_token_id == tokenizer.pad_token_id
    read = AutoTokenizer.from_pretrained(folder)
    assert read.chat_template == policy.spec.chat.template_text
    record = json.loads((folder / "policy.json").read_text())
    assert record["system_prompt"] == "Be brief."
    assert record["limits"] == {"max_prompt_tokens": 64, "max_response_tokens": 48}
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1


def test_the_card_says_how_to_use_it_and_that_runs(
    make_policy: MakePolicy,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = make_policy(chat=ChatFormat(system_prompt='Say "yes".'))
    policy.save_pretrained(tmp_path / "export", tokenizer)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "made-up rows" in card
    assert policy.spec.chat.template_hash in card
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "export")
    made: dict[str, Any] = {}
    exec(code.replace("max_new_tokens=256", "max_new_tokens=3"), made)
    messages = [
        {"role": "system", "content": 'Say "yes".'},
        {"role": "user", "content": "What is 2+2?"},
    ]
    assert made["ids"][0].tolist() == policy.spec.chat.prompt_ids(messages)
    assert 1 <= len(made["answer"]) <= 3


def test_an_export_is_replaced_and_other_folders_are_not(
    make_policy: MakePolicy, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    policy = make_policy()
    policy.save_pretrained(tmp_path / "export", tokenizer)
    policy.save_pretrained(tmp_path / "export", tokenizer)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds other files"):
        policy.save_pretrained(tmp_path / "mine", tokenizer)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "mine"]


def test_only_exports_are_uploaded_and_only_where_the_hub_is(
    make_policy: MakePolicy,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make_policy().save_pretrained(tmp_path / "export", tokenizer)
    with pytest.raises(UserError, match=f"usable in {tmp_path / 'export'}"):
        push_to_hub(tmp_path / "export", "someone/policy")
    with pytest.raises(UserError, match=r"no reward_model\.json and no policy\.json"):
        push_to_hub(tmp_path, "someone/policy")


def test_training_goes_on_from_an_export(
    make_policy: MakePolicy, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    policy, folder = make_policy(tie_word_embeddings=True), str(tmp_path / "export")
    policy.save_pretrained(folder, tokenizer)
    read = PretrainedTokenizer(folder).build(lambda: iter(()), tmp_path)
    again = Policy(
        Backbone(PretrainedTokenizer(folder), path=folder).build(read, seed=1, lm_head=True),
        PolicySpec(ChatFormat().bind(read), policy.spec.limits, "x"),
    )
    assert again.lm_head.weight is again.backbone.get_input_embeddings().weight
    batch = pack(make_groups([2, 1]))
    with torch.no_grad():
        pairs = [model.response_logprobs(batch).logprobs for model in (policy, again)]
    assert torch.equal(*pairs)


def test_adapters_are_merged_and_the_lm_head_stays_as_it_is(
    tokenizer: PreTrainedTokenizerFast, packed: Packed, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    from helpsteer2.models.lora import Lora

    config = {**SIZES, "vocab_size": 320, "model_type": "llama"}
    backbone = Backbone(TRAINED, init="random", config=config, lora=Lora(rank=2, alpha=4))
    spec = PolicySpec(ChatFormat().bind(tokenizer), LengthLimits(64, 48), "random")
    policy = Policy(backbone.build(tokenizer, seed=0, lm_head=True), spec)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    for name, parameter in policy.named_parameters():
        if name in trained:
            torch.nn.init.normal_(parameter, std=0.3)
    batch, rows = packed(spec.chat)
    plain = plain_model(policy, tokenizer, tmp_path / "export")
    with torch.no_grad():
        ours = policy.response_logprobs(batch).logprobs
        theirs = plain_logprobs(plain, batch, rows, tokenizer.pad_token_id)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_says_the_same_of_real_rows(tmp_path: Path, dtype: str) -> None:
    data = os.environ.get("HELPSTEER2_REAL_DATA")
    if data is None:
        pytest.skip("HELPSTEER2_REAL_DATA is not set: no pretrained model here")
    folder = str(Path(data) / "tinystories_656k")
    tokenizer = PretrainedTokenizer(folder).build(lambda: iter(()), tmp_path)
    chat = ChatFormat().bind(tokenizer)
    source = HelpSteer2(str(Path(data) / "helpsteer2_slice"))
    rows, groups = [], []
    for group in islice(source.read("validation", raise_problem), 6):
        report = CutReport()
        tokens = encode_group(group, 0, chat, LengthLimits(200, 200), (), (), report)
        groups.append(tokens)
        rows += [[*tokens.prompt_ids.tolist(), *ids.tolist()] for ids in tokens.response_ids]
    batch = pack(groups)
    backbone = Backbone(PretrainedTokenizer(folder), path=folder, dtype=dtype)
    spec = PolicySpec(chat, LengthLimits(200, 200), "TinyStories")
    policy = Policy(backbone.build(tokenizer, seed=0, lm_head=True), spec)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ours = policy.response_logprobs(batch).logprobs
        theirs = plain_logprobs(plain, batch, rows, tokenizer.pad_token_id)
    error = (ours - theirs).abs()
    print(f"{dtype}: |error| a token: mean {error.mean():.1e}, largest {error.max():.1e} nats")
    assert error.max() <= (1e-4 if dtype == "float32" else 1.0)
    assert error.mean() <= (1e-5 if dtype == "float32" else 0.05)


def raise_problem(problem: Any) -> None:
    raise AssertionError(problem)


def test_a_checkpoint_without_lm_head_is_no_policy(
    make_policy: MakePolicy, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make_policy(tie_word_embeddings=False).backbone.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks weights .*lm_head\.weight"):
        Backbone(TRAINED, path=str(tmp_path)).build(tokenizer, seed=0, lm_head=True)
