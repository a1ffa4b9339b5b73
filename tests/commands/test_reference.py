"""``helpsteer2 reference``: all of the log-probabilities or none, and the same by any cut."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands import reference as command
from helpsteer2.commands.launch import launch
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.reference import Reference
from helpsteer2.data.tokenise import tokenise
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.attention import implementation_name
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec
from helpsteer2.models.reference import policy_hash
from helpsteer2.world.source import WorldSource
from tests.full_disk import largest_file

LIMITS = LengthLimits(600, 400)
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Exports of random policies: the second is the first in several files, the third another."""
    root = tmp_path_factory.mktemp("policies")
    tokenizer = TrainedTokenizer(300).build(lambda: iter(["to be or not to be"]), root)
    config = AutoConfig.for_model(
        "llama", vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    spec = PolicySpec(ChatFormat().bind(tokenizer), LIMITS, "random")
    for name, seed in (("one", 0), ("other", 1)):
        torch.manual_seed(seed)
        causal_lm = AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation_name("sdpa")
        )
        Policy(causal_lm, spec).save_pretrained(root / name, tokenizer)
    causal_lm = AutoModelForCausalLM.from_pretrained(root / "one")
    causal_lm.save_pretrained(root / "cut", max_shard_size="10KB")
    AutoTokenizer.from_pretrained(root / "one").save_pretrained(root / "cut")
    return [root / "one", root / "cut", root / "other"]


@pytest.fixture
def run(policies: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command on the made-up world; the folder that it writes."""
    monkeypatch.setattr(sys, "argv", ["helpsteer2"])

    def call(*overrides: str, run_dir: Path = tmp_path / "run") -> Path:
        given = [
            f"run_dir={run_dir}", f"model={policies[0]}", f"cache_dir={tmp_path / 'cache'}",
            "data.groups=12", "data.validation_groups=5", "lengths.max_prompt_tokens=600",
            "lengths.max_response_tokens=400",
        ]  # fmt: skip
        try:
            assert launch(CONFIG_COMMANDS["reference"], [*given, *overrides]) == 0
        finally:
            GlobalHydra.instance().clear()
        return run_dir / "reference"

    return call


def test_log_probabilities_are_those_of_plain_transformers(
    run: Run, policies: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run()
    result = json.loads((folder.parent / "result.json").read_text())
    assert result["kind"] == "reference"
    assert result["weights"] == policy_hash(policies[0])
    written = load_file(folder / "validation.safetensors")
    assert result["metrics"]["validation"]["responses"] == len(written["lengths"]) == 10
    assert result["metrics"]["validation"]["tokens"] == len(written["logprobs"])
    mean = f"mean log-probability {written['logprobs'].mean():.3f}"
    assert mean in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(policies[0], dtype=torch.float32).eval()
    chat = ChatFormat().bind(AutoTokenizer.from_pretrained(policies[0]))
    source = WorldSource(groups=12, validation_groups=5, seed=0)
    groups = tokenise(source, "validation", chat, LIMITS, (), tmp_path / "cache", close_cut=False)
    theirs, lengths = [], []
    for group in (groups[i] for i in range(len(groups))):
        for response in group.response_ids:
            ids = torch.tensor([*group.prompt_ids.tolist(), *response.tolist()])
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, len(group.prompt_ids) - 1 : -1]
            targets = ids[len(group.prompt_ids) :, None]
            theirs.append(logits.log_softmax(1).gather(1, targets)[:, 0].numpy())
            lengths.append(len(response))
    assert written["lengths"].tolist() == lengths
    assert np.abs(written["logprobs"] - np.concatenate(theirs)).max() <= 1e-5
    joined = Reference.open(folder).join(groups, "validation")
    sums = np.concatenate([joined[i].ref_logprobs for i in range(len(joined))])
    assert sums == pytest.approx([values.sum(dtype=float) for values in theirs], abs=1e-4)


def test_the_cut_changes_nothing_but_rounding(run: Run, tmp_path: Path) -> None:
    whole = load_file(run() / "train.safetensors")
    cut = run("tokens_per_microbatch=1", run_dir=tmp_path / "cut")
    assert np.abs(load_file(cut / "train.safetensors")["logprobs"] - whole["logprobs"]).max() < 1e-5


def test_what_is_there_is_not_computed_again(
    run: Run, policies: list[Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = run()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(Policy, "from_pretrained", lambda *_: pytest.fail("loaded"))
    run()
    run(f"model={policies[1]}")  # the same weights, cut into files in another way
    assert capsys.readouterr().out.count("holds these log-probabilities already") == 2
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["helpsteer2"])
    run(f"model={policies[2]}")
    assert Reference.open(folder).weights == policy_hash(policies[2]) != policy_hash(policies[0])
    (folder / "train.safetensors").write_bytes(b"")
    run(f"model={policies[2]}")
    assert (folder / "train.safetensors").stat().st_size > 0


def test_a_killed_run_leaves_all_or_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_die(*arguments: Any) -> None:
        write(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    write = command.write_reference
    run_dir = tmp_path / "killed"
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(command, "write_reference", write_and_die)
        run(run_dir=run_dir)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (run_dir / "reference").exists()
    assert not (run_dir / "result.json").exists()
    folder = run(run_dir=run_dir)
    assert sorted(path.name for path in folder.iterdir()) == [
        "reference.json", "train.safetensors", "validation.safetensors",
    ]  # fmt: skip
    assert [path.name for path in run_dir.iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_is_told_and_leaves_the_older_folder(
    run: Run, policies: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        largest_file(2000),
        pytest.raises(UserError, match=r"cannot write tokenised data to .*; make room"),
    ):
        run()
    folder = run()  # and the tokenised data are there from now on
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    with (
        largest_file(2000),
        pytest.raises(UserError, match=r"cannot write .*/reference: .*; make room.*untouched"),
    ):
        run(f"model={policies[2]}")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    run(f"model={policies[2]}")
    assert Reference.open(folder).weights == policy_hash(policies[2])


def test_a_folder_without_weights_and_a_broken_policy_are_refused(
    run: Run, policies: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="splits is empty"):
        run("splits=[]")
    model = AutoModelForCausalLM.from_pretrained(policies[0])
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(policies[0]).save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match=r"not finite, in groups 'train-0'"):
        run(f"model={tmp_path / 'broken'}")
    (tmp_path / "broken/model.safetensors").unlink()
    with pytest.raises(UserError, match="is no model folder: it has no safetensors"):
        run(f"model={tmp_path / 'broken'}")


@pytest.mark.slow
def test_pairs_reference_and_training_fit_together(policies: list[Path], tmp_path: Path) -> None:
    lengths = ["lengths.max_prompt_tokens=600", "lengths.max_response_tokens=400"]
    pairs = ["data=groups", f"data.path={tmp_path / 'pairs'}", f"cache_dir={tmp_path / 'cache'}"]
    chain = {
        "pairs": ["data=world", "data.groups=24", "data.validation_groups=12"],
        "reference": [f"model={policies[0]}", *pairs, *lengths],
        "train": [
            "module=dpo", "backbone=local", f"backbone.path={policies[0]}", *pairs, *lengths,
            f"reference={tmp_path / 'reference' / 'reference'}", "trainer=cpu",
            "batching.global_batch=4", "batching.max_steps=2", "schedule.validate_every=1",
        ],
    }  # fmt: skip
    for name, overrides in chain.items():
        command = [sys.executable, "-m", "helpsteer2", name, f"run_dir={tmp_path / name}"]
        ran = subprocess.run([*command, *overrides], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = list(csv.DictReader((tmp_path / "train" / "metrics.csv").open()))
    first = next(row["value"] for row in rows if row["metric"] == "train/loss")
    assert float(first) == pytest.approx(math.log(2), abs=1e-5)
    assert (tmp_path / "train" / "export" / "model.safetensors").is_file()
