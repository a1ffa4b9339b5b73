"""References of DPO: ln 2 at the first step, and none that is not of the run's own texts."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpsteer2.commands.train import train
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.datamodule import Batching, GroupDataModule
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.tokenise import tokenise
from helpsteer2.data.tokenizer import PretrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.lora import Lora
from helpsteer2.models.start import PolicyStart
from tests.training.policies import dpo, first_loss, refer, train_policy
from tests.training.runs import ToyGroups, arguments
from tests.training.test_step import LIMITS

LN_2 = math.log(2)


@pytest.mark.parametrize("lora", [None, Lora(rank=4, target_modules="all-linear")])
def test_the_first_loss_is_ln_2_however_the_reference_was_packed(
    tmp_path: Path, policy: str, lora: Lora | None
) -> None:
    if lora is not None:
        pytest.importorskip("peft")
    for tokens in (1, 100_000):
        made = refer(tmp_path / f"reference{tokens}", policy, tokens_per_microbatch=tokens)
        run_dir = tmp_path / f"run{tokens}"
        train(**dpo(run_dir, policy, made, tokens=317, lora=lora))
        assert first_loss(run_dir) == pytest.approx(LN_2, abs=1e-5)
        result = json.loads((run_dir / "result.json").read_text())
        assert result["fingerprints"]["reference"]["is_initial_policy"] is True


def test_the_first_loss_is_near_ln_2_in_bf16(tmp_path: Path, policy: str) -> None:
    made = refer(tmp_path / "reference", policy, precision="bf16-mixed")
    train(**dpo(tmp_path / "run", policy, made, precision="bf16-mixed"))
    assert first_loss(tmp_path / "run") == pytest.approx(LN_2, abs=2e-3)


def test_another_policy_may_be_the_reference_and_is_recorded(
    tmp_path: Path, policy: str, initial: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(**dpo(tmp_path / "first", policy, initial, lr=1e-2))
    trained = str(tmp_path / "first/export")
    train(**dpo(tmp_path / "second", trained, initial))  # iterative DPO against the first policy
    assert first_loss(tmp_path / "second") != pytest.approx(LN_2, abs=1e-5)
    result = json.loads((tmp_path / "second/result.json").read_text())
    weights = json.loads((Path(initial) / "reference.json").read_text())["weights"]
    expected = {"weights": weights, "is_initial_policy": False}
    assert result["fingerprints"]["reference"] == expected
    assert "the reference is another policy" in capsys.readouterr().out


def test_a_run_goes_on_with_its_own_reference_alone(
    tmp_path: Path, policy: str, initial: str
) -> None:
    train(**dpo(tmp_path / "run", policy, initial, lr=1e-2))
    moved = shutil.copytree(initial, tmp_path / "moved")
    train(**dpo(tmp_path / "run", policy, str(moved), lr=1e-2, max_steps=3))
    trained = refer(tmp_path / "trained", str(tmp_path / "run/export"))
    with pytest.raises(UserError, match=r"other data: reference\.is_initial_policy, reference\.w"):
        train(**dpo(tmp_path / "run", policy, trained, lr=1e-2, max_steps=4))


@pytest.mark.parametrize(
    ("made_with", "messages"),
    [
        ({"lengths": LengthLimits(48, 128)}, ["lengths.max_prompt_tokens: 48 there, 64 here"]),
        ({"precision": "bf16-mixed"}, ["trainer.precision: 'bf16-mixed' there, '32-true' here"]),
        ({"dtype": "bfloat16"}, ["backbone.dtype: 'bfloat16' there, 'float32' here"]),
        (
            {"chat": ChatFormat("plain")},
            ["chat.template: "],
        ),
        ({"data": ToyGroups(seed=8)}, ["is of other train data than this run"]),
        ({"splits": ["train"]}, ["has no validation split, only train"]),
    ],
)
def test_a_reference_of_other_inputs_is_refused_before_the_model_is_built(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch, made_with: Any, messages: Any
) -> None:
    made = refer(tmp_path / "reference", policy, **made_with)
    monkeypatch.setattr(PolicyStart, "build", lambda *_: pytest.fail("built"))
    with pytest.raises(UserError) as caught:
        train(**dpo(tmp_path / "run", policy, made))
    told = str(caught.value)
    assert all(message in told for message in messages)
    assert "Make them with the data and chat settings of this run: helpsteer2 reference" in told


def test_a_reference_of_another_tokenizer_is_refused(tmp_path: Path, policy: str) -> None:
    other = train_policy(tmp_path, data_seed=4)
    made = refer(tmp_path / "reference", other)
    with pytest.raises(UserError, match="tokenizer: '"):
        train(**dpo(tmp_path / "run", policy, made))


def test_missing_and_damaged_references_are_told(tmp_path: Path, policy: str, initial: str) -> None:
    with pytest.raises(UserError, match="compute its log-probabilities with helpsteer2 reference"):
        train(**dpo(tmp_path / "run", policy, None))
    with pytest.raises(UserError, match=r"has no reference\.json: make it with helpsteer2"):
        train(**dpo(tmp_path / "run", policy, str(tmp_path)))
    with pytest.raises(UserError, match="SFTModule reads no reference"):
        train(**arguments(tmp_path / "run", module="sft", reference=initial))
    edited = Path(shutil.copytree(initial, tmp_path / "edited"))
    content = bytearray((edited / "train.safetensors").read_bytes())
    content[-1] ^= 1
    (edited / "train.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"train\.safetensors has changed since it was written"):
        train(**dpo(tmp_path / "run", policy, str(edited)))
    (edited / "train.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks train\.safetensors"):
        train(**dpo(tmp_path / "run", policy, str(edited)))
    (edited / "reference.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        train(**dpo(tmp_path / "run", policy, str(edited)))


def test_the_order_of_training_is_that_without_a_reference(
    tmp_path: Path, policy: str, initial: str
) -> None:
    steps = []
    for sums in (None, np.zeros(80, np.float32)):
        tokenizer = PretrainedTokenizer(policy).build(lambda: iter(()), tmp_path)
        groups = tokenise(ToyGroups(), "train", ChatFormat().bind(tokenizer), LIMITS, (), tmp_path)
        if sums is not None:
            groups = groups.with_ref_logprobs(sums)
        batching = Batching(global_batch=6, tokens_per_microbatch=200, max_steps=4)
        plan = GroupDataModule(groups, None, batching, seed=3).plan(1)
        steps.append([plan.step(step) for step in range(4)])
    assert steps[0] == steps[1]
    # And nothing is drawn while the reference is computed, nor left behind in its modules.
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = refer(tmp_path / "again", policy)
    assert torch.equal(torch.get_rng_state(), before)
    for file in ("train.safetensors", "validation.safetensors"):
        assert (Path(again) / file).read_bytes() == (Path(initial) / file).read_bytes()
