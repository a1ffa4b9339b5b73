"""``helpsteer2 sample``: prompts in, groups out, and nothing lost if it is killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands import sample as command
from helpsteer2.commands.launch import launch
from helpsteer2.commands.sample_store import SampleStore
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Group, read_all
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.sources.group_files import GroupFiles
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.generation.local import LocalEngine
from helpsteer2.generation.sampling import Sample, SamplingParams
from helpsteer2.models.attention import implementation_name
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec
from helpsteer2.world.source import WorldSource
from tests.full_disk import largest_file

PROMPTS = 24
WORLD = (f"data.groups={PROMPTS}",)
OPTIONS = [
    "sampling.n=3", "sampling.max_tokens=12", "sampling.top_p=0.9",
    "sampling.temperature=0.7", "engine.max_rows=8", "engine.prompts_per_block=4", "seed=5",
]  # fmt: skip

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("policy")
    tokenizer = TrainedTokenizer(300).build(lambda: iter(["to be or not to be"]), root)
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation_name("sdpa")
    )
    chat = ChatFormat().bind(tokenizer)
    spec = PolicySpec(chat, LengthLimits(400, 100), "random")
    Policy(causal_lm, spec).save_pretrained(root / "export", tokenizer)
    return root / "export"


@pytest.fixture
def run(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(sys, "argv", ["helpsteer2"])

    def call(*overrides: str, folder: str = "run", data: Sequence[str] = WORLD) -> dict[str, Any]:
        given = [f"run_dir={tmp_path / folder}", f"model={policy}", *data, *OPTIONS]
        try:
            assert launch(CONFIG_COMMANDS["sample"], [*given, *overrides]) == 0
        finally:
            GlobalHydra.instance().clear()
        result: dict[str, Any] = json.loads((tmp_path / folder / "result.json").read_text())
        return result

    return call


def read(path: Path) -> list[Group]:
    return list(read_all(GroupFiles(str(path)), "train"))


def test_groups_are_written_in_the_order_of_the_prompts(run: Run, tmp_path: Path) -> None:
    result = run()
    groups = read(tmp_path / "run/groups.jsonl")
    prompts = list(read_all(WorldSource(groups=PROMPTS, validation_groups=256, seed=0), "train"))
    assert [group.id for group in groups] == [prompt.id for prompt in prompts]
    for group, prompt in zip(groups, prompts, strict=True):
        assert group.prompt == prompt.prompt
        assert group.source == "sampled"
        assert group.attributes is None
        assert group.tokenizer == result["model"]["ids_hash"]
        assert len(group.responses) == 3
    metrics = result["metrics"]
    lengths = [len(ids) for group in groups for ids in group.response_ids or ()]
    assert metrics["samples"] == len(lengths) == 3 * PROMPTS
    assert metrics["tokens"] == metrics["tokens_in_this_run"] == sum(lengths)
    assert metrics["mean_tokens"] == pytest.approx(sum(lengths) / len(lengths), abs=1e-3)
    assert metrics["unfinished_samples"] == metrics["finish_reasons"]["length"]
    assert sum(metrics["finish_reasons"].values()) == len(lengths)
    assert metrics["samples_without_logprobs"] == 0
    assert result["sampling"]["seed"] == 5
    assert result["model"]["hash"]
    assert not list((tmp_path / "run").glob("*.partial"))


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = run("max_prompts=4")
    monkeypatch.setattr(LocalEngine, "open", lambda *_: pytest.fail("the policy was loaded"))
    before = (tmp_path / "run/groups.jsonl").stat().st_mtime_ns
    assert run("max_prompts=4") == result
    assert "finished before" in capsys.readouterr().out
    assert (tmp_path / "run/groups.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"other settings.*sampling\.temperature: 0\.7 → 1"):
        run("max_prompts=4", "sampling.temperature=1.0")


def test_long_prompts_are_left_out_counted_and_named(run: Run, tmp_path: Path) -> None:
    everything = run()
    lengths = {}
    chat = Policy.from_pretrained(everything["model"]["path"])[2]
    for group in read_all(WorldSource(groups=PROMPTS, validation_groups=256, seed=0), "train"):
        lengths[group.id] = len(chat.prompt_ids(group.prompt))
    limit = sorted(lengths.values())[PROMPTS // 2]
    result = run(f"max_prompt_tokens={limit}", folder="short")
    too_long = [name for name, length in lengths.items() if length > limit]
    assert result["too_long"] == too_long
    assert result["metrics"]["prompts_too_long"] == len(too_long) > 0
    kept = read(tmp_path / "short/groups.jsonl")
    assert {group.id for group in kept} == lengths.keys() - set(too_long)
    with pytest.raises(UserError, match="none of the 24 prompts"):
        run("max_prompt_tokens=3", folder="none")


def test_settings_that_gave_no_sample_do_not_bind(run: Run) -> None:
    """Whoever follows what an error says goes on in the same folder."""
    with pytest.raises(UserError, match="raise max_prompt_tokens"):
        run("max_prompt_tokens=3")
    with pytest.raises(UserError, match=r"engine\.cache_tokens=50 is too small"):
        run("sampling.max_tokens=40", "engine.cache_tokens=50")
    assert run("sampling.max_tokens=4")["sampling"]["max_tokens"] == 4
    with pytest.raises(UserError, match="other settings"):
        run("sampling.max_tokens=5")


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    run: Run, policy: Path, tmp_path: Path
) -> None:
    run("sampling.max_tokens=40", folder="whole")
    folder = tmp_path / "killed"
    partial = folder / "groups.jsonl.partial"
    given = [f"run_dir={folder}", f"model={policy}", *WORLD, *OPTIONS, "sampling.max_tokens=40"]
    process = subprocess.Popen(
        [sys.executable, "-m", "helpsteer2", "sample", *given],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for(lambda: count_lines(partial) >= 5, process)  # the second block is on its way
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = count_lines(partial)
    with partial.open("ab") as file:
        file.write(b'23\t{"id": "torn')  # as a kill in the middle of a write leaves it
    result = run("sampling.max_tokens=40", folder="killed")
    whole, killed = (tmp_path / name / "groups.jsonl" for name in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes()
    # All but the block that was on its way is still there.
    lengths = [sum(map(len, group.response_ids or ())) for group in read(killed)]
    assert result["metrics"]["tokens_in_this_run"] == sum(lengths[kept // 4 * 4 :])


def test_a_full_disk_is_told_and_the_same_command_goes_on(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(folder="whole")
    expected = (tmp_path / "whole/groups.jsonl").read_bytes()
    message = r"cannot write .*groups\.jsonl\.partial: .*; make room.*; the groups before are kept"
    with largest_file(len(expected) // 2), pytest.raises(UserError, match=message):
        run(folder="full")
    assert not (tmp_path / "full/groups.jsonl").exists()
    with pytest.raises(UserError, match=r"other settings.*max_prompt_tokens"):
        run("max_prompt_tokens=300", folder="full")
    result = run(folder="full")
    assert (tmp_path / "full/groups.jsonl").read_bytes() == expected
    assert result["metrics"]["tokens_in_this_run"] < whole["metrics"]["tokens"]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 400
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=/nowhere"], "there is no file or folder /nowhere"),
        (["sampling.top_q=1"], "did you mean top_p"),
        (["sampling.n=many"], "sampling.n: expected"),
        (["max_prompt_tokens=0"], "has to be 1 or more"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    run: Run, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(*overrides)


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"no number\n")
    with pytest.raises(UserError, match="is damaged"):
        SampleStore(tmp_path / "x")


QUESTIONS = ("Why is the sky blue?", "To be or not to be?", "What is the question?")


@pytest.mark.parametrize("data", ["chat", "groups"])
def test_plain_prompts_are_sampled(run: Run, tmp_path: Path, data: str) -> None:
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    rows: list[dict[str, Any]] = [{"messages": prompt} for prompt in prompts]
    if data == "groups":
        rows = [{"id": f"train-{i}", "prompt": prompt} for i, prompt in enumerate(prompts)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(data=[f"data={data}", f"data.path={path}"])
    groups = read(tmp_path / "run/groups.jsonl")
    assert [group.id for group in groups] == ["train-0", "train-1", "train-2"]
    assert [list(group.prompt) for group in groups] == prompts
    assert all(len(group.responses) == 3 for group in groups)


class SlowSampler:
    """Two samples of fifty tokens a prompt, ten seconds each prompt by a clock of its own.

    Args:
        drawn: What the console has drawn so far.
    """

    ids_hash = "hash"
    prompts_per_block = 1

    def __init__(self, drawn: Callable[[], str]) -> None:
        self.seconds = 0.0
        self._drawn = drawn

    def sample(
        self, prompts: Iterable[Group], params: SamplingParams
    ) -> Iterator[tuple[Group, list[Sample]]]:
        for number, group in enumerate(prompts):
            self.seconds += 10
            yield group, [Sample((7,) * 50, "text", "stop", None)] * 2
            # The bar is drawn by a thread, several times a second.
            until = time.monotonic() + 60
            while f"{2 * number + 4}/8" not in self._drawn():
                assert time.monotonic() < until
                time.sleep(0.01)


def test_the_progress_bar_tells_speed_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    sampler = SlowSampler(out.getvalue)

    def clock() -> float:
        return sampler.seconds

    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=clock))
    console = Console(file=out, force_terminal=True, width=100, get_time=clock, color_system=None)
    prompts = [Group(str(i), "x", ({"role": "user", "content": "?"},), ()) for i in range(4)]
    params = SamplingParams(n=2, max_tokens=64, seed=0)
    with SampleStore(tmp_path / "store") as store:
        done = Group("0", "x", prompts[0].prompt, ("a", "b"))
        store.add(0, done)  # by an earlier run, so it counts for the bar but not for the speed
        assert command._sample_all(prompts, sampler, params, store, console) == 300
    first = next(line for line in out.getvalue().splitlines() if "4/8" in line)
    assert first.split()[-5:] == ["4/8", "10", "tokens/s", "ETA", "0:00:20"]
