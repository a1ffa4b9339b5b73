"""An exported policy is the trained one: whole, merged, as an adapter on its base, and in peft."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.groups import Group
from helpsteer2.data.lengths import CutReport, LengthLimits
from helpsteer2.data.packing import PackedBatch, pack
from helpsteer2.data.tokenise import encode_group
from helpsteer2.data.tokenizer import PretrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.lora import ADAPTER_WEIGHTS, Lora
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec
from helpsteer2.models.start import PolicyStart

from .adapters import wake
from .packed_reference import SIZES, make_groups

HAS_PEFT = importlib.util.find_spec("peft") is not None
needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
LIMITS = LengthLimits(64, 48)
MakeTrained = Callable[..., tuple[Policy, Path]]


@pytest.fixture
def base(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A causal LM as others publish them, without a chat template."""
    from transformers import AutoConfig

    torch.manual_seed(5)
    config = AutoConfig.for_model("llama", **{**SIZES, "vocab_size": 320})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def make_trained(base: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> MakeTrained:
    def make(lora: Lora | None = None, chat: ChatFormat | None = None) -> tuple[Policy, Path]:
        backbone = Backbone(PretrainedTokenizer(str(base)), path=str(base), lora=lora)
        causal_lm = backbone.build(tokenizer, seed=1, lm_head=True)
        wake(causal_lm)
        bound = (chat or ChatFormat()).bind(tokenizer)
        policy = Policy(causal_lm, PolicySpec(bound, LIMITS, "base", "made-up rows", "a loss"))
        policy.save_pretrained(tmp_path / "export", tokenizer)
        return policy, tmp_path / "export"

    return make


@torch.no_grad()
def logprobs(policy: Policy) -> Tensor:
    return policy.response_logprobs(pack(make_groups([2, 1, 3]))).logprobs


def conversation(n: int) -> Group:
    """Several turns and n responses."""
    roles = ("system", "user", "assistant", "user")
    texts = ("Be kind.", "Good morning!", "To you!", "What is the capital?")
    prompt = tuple({"role": r, "content": t} for r, t in zip(roles, texts, strict=True))
    return Group("a", "here:1", prompt, tuple(f"{'Paris, ' * i}Paris." for i in range(n)))


def packed(chat: BoundChat, sizes: Sequence[int]) -> tuple[PackedBatch, list[list[int]]]:
    """Conversations as one packed row, and each response behind its prompt."""
    groups = [
        encode_group(conversation(n), i, chat, LengthLimits(100, 100), (), (), CutReport())
        for i, n in enumerate(sizes)
    ]
    rows = [
        [*group.prompt_ids.tolist(), *ids.tolist()]
        for group in groups
        for ids in group.response_ids
    ]
    return pack(groups), rows


@torch.no_grad()
def plain_logprobs(model: Any, rows: list[list[int]], lengths: Sequence[int]) -> Tensor:
    """``(N,)`` from transformers' own logits, one response after the other."""
    parts = []
    for row, length in zip(rows, lengths, strict=True):
        of_row = model(torch.tensor([row])).logits[0, :-1].float().log_softmax(dim=-1)
        parts.append(of_row.gather(1, torch.tensor(row[1:])[:, None])[-length:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("n", [1, 2, 10])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_gives_the_same_logprobs_in_plain_transformers(
    make_trained: MakeTrained, n: int, dtype: Any
) -> None:
    _, folder = make_trained()
    policy, _, chat = Policy.from_pretrained(folder, dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch, rows = packed(chat, [n, 1, n])
    lengths = [m for responses in batch.layout.response_lengths for m in responses]
    with torch.no_grad():
        ours = policy.response_logprobs(batch).logprobs
    error = (ours - plain_logprobs(plain, rows, lengths)).abs()
    print(
        f"{dtype}, n={n}: |error| mean {error.mean():.1e}, largest {error.max():.1e} nats a token"
    )
    assert error.max() <= (1e-5 if dtype == "float32" else 1.0)
    assert error.mean() <= (1e-5 if dtype == "float32" else 0.05)


def test_a_whole_export_comes_back_as_it_was(
    make_trained: MakeTrained, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained, folder = make_trained(chat=ChatFormat(system_prompt="Be brief."))
    policy, read, chat = Policy.from_pretrained(folder)
    assert torch.equal(logprobs(policy), logprobs(trained))
    assert not policy.training
    assert chat.system_prompt == "Be brief."
    assert chat.template_name == trained.spec.chat.template_name
    assert (policy.spec.limits, policy.spec.data) == (LIMITS, "made-up rows")
    policy.save_pretrained(tmp_path / "again", read)
    for name in ("policy.json", "README.md"):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()


@needs_peft
@pytest.mark.parametrize("moved", [False, True])
def test_an_adapter_on_its_base_is_the_trained_policy(
    make_trained: MakeTrained, base: Path, moved: bool
) -> None:
    trained, folder = make_trained(Lora(rank=4, alpha=8, target_modules="all-linear"))
    exact = logprobs(trained)
    merged, _, _ = Policy.from_pretrained(folder)
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(logprobs(merged), exact, rtol=0, atol=2e-5)
    elsewhere = None
    if moved:
        elsewhere = base.rename(base.with_name("elsewhere"))
        with pytest.raises(UserError, match=f"adapter_config.json; or give {folder}, the same"):
            Policy.from_pretrained(folder / "adapter")
    policy, _, chat = Policy.from_pretrained(folder / "adapter", base=elsewhere)
    assert any("lora" in name for name in policy.state_dict())
    assert torch.equal(logprobs(policy), exact)
    assert chat.template_hash == trained.spec.chat.template_hash


@needs_peft
def test_training_cannot_go_on_from_an_adapter_but_from_the_folder_above(
    make_trained: MakeTrained, tokenizer: PreTrainedTokenizerFast
) -> None:
    _, folder = make_trained(Lora(rank=4, alpha=8))
    adapter = Backbone(PretrainedTokenizer(str(folder)), path=str(folder / "adapter"))
    with pytest.raises(UserError, match=f"holds an adapter only: give {folder}, the same model"):
        adapter.build(tokenizer, seed=0, lm_head=True)


@needs_peft
def test_cards_of_merged_and_unmerged_weights_run_and_answer_alike(
    make_trained: MakeTrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = make_trained(Lora(rank=4, alpha=8))
    assert "adapters merged" in (folder / "README.md").read_text()
    answers = []
    for place in (folder, folder / "adapter"):
        code = (place / "README.md").read_text().split("```python\n")[1].split("```")[0]
        monkeypatch.chdir(place)
        made: dict[str, Any] = {}
        exec(code.replace("max_new_tokens=256", "max_new_tokens=5"), made)
        answers.append(made["answer"].tolist())
    assert 1 <= len(answers[0]) <= 5
    assert answers[0] == answers[1]


@needs_peft
def test_an_adapter_of_a_random_base_is_only_merged(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = {**SIZES, "vocab_size": 320, "model_type": "llama"}
    backbone = Backbone(
        PretrainedTokenizer("unused"), init="random", config=config, lora=Lora(rank=2)
    )
    spec = PolicySpec(ChatFormat().bind(tokenizer), LIMITS, "random llama")
    policy = Policy(backbone.build(tokenizer, seed=0, lm_head=True), spec)
    policy.save_pretrained(tmp_path / "x", tokenizer)
    assert not (tmp_path / "x/adapter").exists()


@needs_peft
def test_an_adapter_of_another_base_is_refused(
    make_trained: MakeTrained, base: Path, tmp_path: Path
) -> None:
    _, folder = make_trained(Lora(rank=2))
    other = AutoModelForCausalLM.from_pretrained(base)
    torch.nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    shutil.copytree(base, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="not the weights that it was trained beside"):
        Policy.from_pretrained(folder / "adapter", base=tmp_path / "other")
    with pytest.raises(UserError, match="base is for an adapter alone"):
        Policy.from_pretrained(folder, base=base)
    (folder / "adapter" / ADAPTER_WEIGHTS).write_bytes(b"x")
    with pytest.raises(UserError, match="is damaged"):
        Policy.from_pretrained(folder / "adapter")
    (folder / "adapter/policy.json").unlink()
    with pytest.raises(UserError, match="of another project"):
        Policy.from_pretrained(folder / "adapter")


def test_what_is_no_policy_any_more_is_refused(make_trained: MakeTrained, tmp_path: Path) -> None:
    _, folder = make_trained()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template + " ")
    with pytest.raises(UserError, match="the chat template changed since"):
        Policy.from_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="the chat template changed since"):
        Policy.from_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template.replace("\n", "\r\n"))
    Policy.from_pretrained(folder)
    record = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps({**record, "tokenizer_hash": "0"}))
    with pytest.raises(UserError, match="the tokenizer changed"):
        Policy.from_pretrained(folder)
    del record["limits"]
    (folder / "policy.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"is damaged .*limits"):
        Policy.from_pretrained(folder)
    with pytest.raises(UserError, match="no such folder"):
        Policy.from_pretrained(tmp_path / "nowhere/at/all")


def test_models_of_others_need_a_chat_template(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match="has no chat template"):
        Policy.from_pretrained(base)
    tokenizer.chat_template = ChatFormat("plain").bind(tokenizer).template_text
    tokenizer.save_pretrained(base)
    policy, _, chat = Policy.from_pretrained(base)
    assert chat.template_text == tokenizer.chat_template
    assert policy.spec.limits == LengthLimits(256, 256)
    (base / "reward_model.json").write_text("{}")
    with pytest.raises(UserError, match="is a reward model"):
        Policy.from_pretrained(base)


def test_going_on_with_another_system_prompt_is_refused(
    make_trained: MakeTrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = make_trained(chat=ChatFormat(system_prompt="Be brief."))
    backbone = Backbone(PretrainedTokenizer(str(folder)), path=str(folder))

    def bound(system_prompt: str | None) -> BoundChat:
        chat = ChatFormat(system_prompt=system_prompt)
        return PolicyStart().chat(chat, backbone, lambda: iter(()), str(tmp_path))

    assert bound("Be brief.").system_prompt == "Be brief."
    for other in (None, "Be kind."):
        with pytest.raises(UserError, match=r"prompt 'Be brief\.', and chat\.system_prompt is"):
            bound(other)
    # Weights from scratch go on from nothing, whatever the folder around them holds.
    monkeypatch.chdir(folder)
    backbone = Backbone(PretrainedTokenizer(str(folder)), init="random", config={})
    assert bound("Be kind.").system_prompt == "Be kind."
