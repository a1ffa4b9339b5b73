"""A run that is killed anywhere, or asked to stop, goes on to the very same end."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.callbacks.checkpoints import LAST, Checkpoints, read_checkpoint
from helpsteer2.generation.local import LocalEngine
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.models.lora import Lora
from helpsteer2.modules.on_policy import OnPolicyModule
from helpsteer2.rollouts import assemble as assembling
from helpsteer2.rollouts import maker as making
from helpsteer2.rollouts.advantages import AgainstBaseline
from helpsteer2.rollouts.maker import RolloutMaker
from helpsteer2.rollouts.store import Rollouts
from tests.rollouts.runs import Run, ToyScorer, end, iteration, make, run_child
from tests.training.runs import Child, start_ranks
from tests.training.test_resume import assert_same

pytestmark = pytest.mark.slow

ADAPTIVE = KLPenalty(0.05, target=0.5, horizon=64)
WHOLE_ITERATIONS = 3


def nth_call(n: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """Ends this process at the n-th call."""
    calls = iter(range(1, n))

    def count() -> None:
        if next(calls, None) is None:
            end(number)

    return count


def at_block(stage: str, iteration: int, done: int, number: int = signal.SIGKILL) -> None:
    """End when so many responses of an iteration have what a stage makes."""
    inner = RolloutMaker.make

    def make(self: RolloutMaker, at: int, learner: Any, autocast: Any, report: Any) -> Rollouts:
        def telling(name: str, so_far: int, total: int) -> None:
            if (name, at, so_far) == (stage, iteration, done):
                end(number)
            report(name, so_far, total)

        return inner(self, at, learner, autocast, telling)

    RolloutMaker.make = make  # type: ignore[method-assign]


def in_step(n: int) -> None:
    """End in the midst of a step: at the n-th micro-batch."""
    count, inner = nth_call(n), OnPolicyModule.loss_sums

    def loss_sums(self: Any, batch: Any) -> Any:
        count()
        return inner(self, batch)

    OnPolicyModule.loss_sums = loss_sums  # type: ignore[method-assign]


def when_made(n: int) -> None:
    """End when the n-th iteration is whole, before anything is learned from it."""
    count, inner = nth_call(n), making.assemble

    def assemble(*args: Any, **options: Any) -> None:
        inner(*args, **options)
        count()

    making.assemble = assemble


def before_made(n: int) -> None:
    """End when the n-th iteration has all its files but the record."""
    count, inner = nth_call(n), assembling.write_json_atomic

    def write(path: Any, content: Any) -> None:
        count()
        inner(path, content)

    assembling.write_json_atomic = write


def when_saved(n: int) -> None:
    """End right after the n-th checkpoint."""
    count, inner = nth_call(n), Checkpoints._save_last

    def save(self: Any, trainer: Any) -> None:
        before = trainer.global_step
        inner(self, trainer)
        if before % 4 == 0:
            count()

    Checkpoints._save_last = save  # type: ignore[method-assign]


PLACES = {
    "sampling the first iteration": partial(at_block, "samples", 0, 16),
    "scoring": partial(at_block, "scores", 0, 24),
    "the first steps": partial(in_step, 3),
    "the first iteration's end": partial(when_saved, 1),
    "log-probabilities": partial(at_block, "logprobs", 1, 16),
    "those of the reference": partial(at_block, "reference", 1, 8),
    "the last file": partial(before_made, 1),
    "whole rollouts": partial(when_made, 1),
    "a step": partial(in_step, 3),
    "sampling the last iteration": partial(at_block, "samples", 2, 8),
    "the run's end": partial(when_saved, 1),
}
"""Where a process of a run is killed, one after the other: what is done is not done again, so that
the first iteration that it makes is the one that the last process was at."""


@pytest.fixture(scope="module")
def runs(policy: str, other_policy: str) -> dict[str, Run]:
    changes: dict[str, Any] = {"reference": other_policy}
    module = {"kl": ADAPTIVE}
    return {
        "ppo": Run(policy, rollouts=changes, module={**module, "critic_first_steps": 2}),
        "reinforce": Run(policy, "reinforce", rollouts=changes, module=module),
        "lora": Run(policy, lora=Lora(rank=4, dropout=0.2), module=module),
    }


@pytest.fixture(scope="module")
def wholes(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The uninterrupted run of a kind, made when it is first asked for."""
    made: dict[str, Path] = {}

    def whole(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "run"
            runs[kind].start(made[kind]).join()
        return made[kind]

    return whole


def assert_same_run(run_dir: Path, whole: Path) -> None:
    """Weights, optimizer, log, rollouts and export are the same to the last bit."""
    ours, theirs = (read_checkpoint(path / "checkpoints" / LAST) for path in (run_dir, whole))
    for part in ("state_dict", "global_step", "optimizer_states", "lr_schedulers", "seen"):
        assert_same(ours[part], theirs[part], part)
    for name in ("metrics.csv", "export/model.safetensors"):
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes(), name
    made = [sorted(path.name for path in (run / "rollouts").iterdir()) for run in (run_dir, whole)]
    assert made[0] == made[1]
    for number in range(WHOLE_ITERATIONS):
        mine, other = iteration(run_dir, number), iteration(whole, number)
        for name in ("groups.jsonl", "columns.npy"):
            assert (mine.folder / name).read_bytes() == (other.folder / name).read_bytes()
        changing = {"seconds"}
        assert {k: v for k, v in mine.record.items() if k not in changing} == {
            k: v for k, v in other.record.items() if k not in changing
        }
        left = {path.name for path in mine.folder.iterdir()}
        assert left == {"groups.jsonl", "columns.npy", "record.json", "tokens"}


def killed(run: Run, run_dir: Path, place: Callable[[], None]) -> None:
    child = run.start(run_dir, place)
    child.process.join(200)
    assert child.process.exitcode == -signal.SIGKILL, child.text
    assert not (run_dir / "result.json").exists()


@pytest.mark.parametrize("kind", ["ppo", "reinforce", "lora"])
def test_a_run_killed_everywhere_equals_uninterrupted(
    tmp_path: Path, runs: dict[str, Run], wholes: Callable[[str], Path], kind: str
) -> None:
    for place, action in PLACES.items():
        print(place)
        killed(runs[kind], tmp_path / "run", action)
    runs[kind].start(tmp_path / "run").join()
    assert_same_run(tmp_path / "run", wholes(kind))


def test_killed_at_any_moment_equals_uninterrupted(
    tmp_path: Path, runs: dict[str, Run], wholes: Callable[[str], Path]
) -> None:
    """Another moment at every call of the test, and another number of saves."""
    whole = wholes("ppo")
    run = replace(runs["ppo"], checkpoint_every=random.choice([1, 2, 3, 1000]))
    for _ in range(3):
        child = run.start(tmp_path / "run")
        child.wait_for((tmp_path / "run/rollouts/iteration_000000").exists)
        time.sleep(random.uniform(0, 0.7))
        with contextlib.suppress(ProcessLookupError):  # it may have come to its end
            child.signal(signal.SIGKILL)
        child.process.join(60)
        assert child.process.exitcode in (0, -signal.SIGKILL), child.text
    run.start(tmp_path / "run").join()
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_sampling_stops_behind_the_block(
    tmp_path: Path, runs: dict[str, Run], wholes: Callable[[str], Path], number: int, code: int
) -> None:
    run, run_dir = runs["reinforce"], tmp_path / "run"
    text = run.start(run_dir, partial(at_block, "samples", 1, 16, number)).join(code)
    assert f"run_dir={run_dir} goes on" in text
    assert "Traceback" not in text
    begun = run_dir / "rollouts/iteration_000001"
    assert [path.name for path in begun.iterdir()] == ["samples"]
    # Two blocks of eight responses were there when it came.
    assert len(list((begun / "samples").iterdir())) == 2
    assert read_checkpoint(run_dir / "checkpoints" / LAST)["global_step"] == 4
    run.start(run_dir).join()
    assert_same_run(run_dir, wholes("reinforce"))


def test_no_response_is_scored_twice_in_a_killed_run(tmp_path: Path, policy: str) -> None:
    calls, run_dir = tmp_path / "calls", tmp_path / "run"
    run = Run(policy, "reinforce", max_steps=8, rollouts={"rewarder": partial(ToyScorer, calls)})
    for place in (partial(at_block, "scores", 0, 16), partial(at_block, "logprobs", 0, 8)):
        killed(run, run_dir, place)
    killed(run, run_dir, partial(at_block, "scores", 1, 8))
    run.start(run_dir).join()
    assert set(Counter(calls.read_text().splitlines()).values()) == {1}
    assert len(calls.read_text().splitlines()) == 2 * 8 * 4


def test_rollouts_of_other_settings_are_thrown_away_before_the_first_step(
    tmp_path: Path, policy: str
) -> None:
    killed(Run(policy), tmp_path / "run", partial(at_block, "scores", 0, 16))
    for name in ("run", "new"):
        Run(policy, max_steps=4, seed=2).train(tmp_path / name)
    ours, theirs = (iteration(tmp_path / name).folder / "columns.npy" for name in ("run", "new"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_two_ranks_are_killed_and_go_on(tmp_path: Path, policy: str) -> None:
    run = Run(policy, devices=2, max_steps=8)
    for rank in start_ranks(run_child, tmp_path, run, tmp_path / "whole"):
        rank.join()
    ranks: list[Child] = start_ranks(
        run_child, tmp_path, run, tmp_path / "run", partial(at_block, "scores", 1, 32)
    )
    for rank in ranks:
        rank.process.join(100)
        rank.process.kill()
    for rank in start_ranks(run_child, tmp_path, run, tmp_path / "run"):
        rank.join()
    ours, theirs = (read_checkpoint(tmp_path / x / "checkpoints" / LAST) for x in ("run", "whole"))
    assert_same(ours["state_dict"], theirs["state_dict"])
    for name in ("groups.jsonl", "columns.npy"):
        mine, other = (iteration(tmp_path / x, 1).folder / name for x in ("run", "whole"))
        assert mine.read_bytes() == other.read_bytes()


def test_blocks_of_another_size_are_not_taken_for_ones_own(tmp_path: Path, policy: str) -> None:
    """As after a change of the number of ranks, who share the prompts of an iteration evenly."""

    class Stopped(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "scores":
            raise Stopped

    def engine(prompts: int) -> LocalEngine:
        return LocalEngine(prompts_per_block=prompts, device="cpu")

    with pytest.raises(Stopped):
        make(tmp_path / "run", policy, AgainstBaseline(), report=stop, engine=engine(4))
    assert len(list((tmp_path / "run").glob("*/samples/*.jsonl"))) == 2
    found = make(tmp_path / "run", policy, AgainstBaseline(), engine=engine(2))
    whole = make(tmp_path / "whole", policy, AgainstBaseline(), engine=engine(2))
    for name in ("groups.jsonl", "columns.npy"):
        assert (found.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert {path.name for path in found.folder.iterdir()} == {
        path.name for path in whole.folder.iterdir()
    }
