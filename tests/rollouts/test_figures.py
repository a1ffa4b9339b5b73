"""Figures of an iteration against what its files say, and what is shown of them."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpsteer2.callbacks.rollouts import response_table, summary_of
from helpsteer2.data.groups import Group, read_all
from helpsteer2.data.sources.group_files import GroupFiles
from helpsteer2.generation.local import LocalEngine
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.rollouts.advantages import GAE, AgainstBaseline
from helpsteer2.rollouts.figures import repetition
from helpsteer2.rollouts.store import Rollouts
from tests.rollouts.runs import Run, ToyPrompts, ToyScorer, iteration, make, metrics
from tests.rollouts.test_columns import Response, flat, responses_of


def test_repetition_is_the_share_of_pieces_seen_before() -> None:
    assert repetition((1, 2, 3, 4, 5)) == 0
    assert repetition(()) == repetition((1, 2)) == repetition((7, 7, 7)) == 0
    assert repetition((7,) * 12) == pytest.approx(9 / 10)
    assert repetition((1, 2, 3) * 3) == pytest.approx(4 / 7)  # 123 231 312 of seven pieces


def test_figures_are_means_over_the_responses(
    tmp_path: Path, policy: str, other_policy: str
) -> None:
    rollouts = make(
        tmp_path, policy, AgainstBaseline(), KLPenalty(0.1), reference=other_policy,
        unfinished="penalise", penalty=0.5,
    )  # fmt: skip
    rows = responses_of(rollouts)
    every: list[Response] = flat(rows)
    ratios = [one.columns["logprobs"] - one.columns["ref_logprobs"].astype(float) for one in every]
    texts = [text for group in rollouts.groups() for text in group.responses]
    earned = np.array([[one.reward - 0.5 * one.unfinished for one in row] for row in rows])
    sampled = np.concatenate([x for group in rollouts.groups() for x in group.logprobs or ()])
    own = np.concatenate([one.columns["logprobs"] for one in every])
    expected = {
        "reward": earned.mean(),
        "weighted_score": np.mean([one.reward for one in every]),
        "reward_std": earned.std(ddof=1),
        "reward_std_in_prompt": earned.std(axis=1).mean(),
        "kl": np.mean([x.sum() for x in ratios]),
        "kl_k3": np.mean([(np.exp(-x) - 1 + x).sum() for x in ratios]),
        "tokens": np.mean([len(one.ids) for one in every]),
        "unfinished": np.mean([one.unfinished for one in every]),
        "empty": np.mean([not text.strip() for text in texts]),
        "repetition": np.mean([repetition(tuple(one.ids.tolist())) for one in every]),
        "entropy": -own.astype(float).mean(),
        "sampler_gap_mean": abs(own - sampled).mean(),
        "sampler_gap_max": abs(own - sampled).max(),
        "kl_coefficient": 0.1,
        "rate_factor": 1.0,
    }
    scores = np.concatenate([group.scores for group in rollouts.groups()])
    expected |= {"score/letters": scores[:, 0].mean(), "score/length": scores[:, 1].mean()}
    found = {name.removeprefix("rollout/"): value for name, value in rollouts.metrics.items()}
    assert found == pytest.approx(expected, abs=1e-7, rel=1e-5)
    assert found["sampler_gap_max"] < 1e-4
    assert found["kl"] > 0.1


class Negated(ToyScorer):
    """Thinks the contrary of one score, and its own of the other."""

    def score(self, groups: Iterable[Group]) -> Iterator[np.ndarray]:
        return (scores * [-1, 0] for scores in super().score(groups))


def test_watchers_rate_and_decide_nothing(tmp_path: Path, policy: str) -> None:
    watch: dict[str, Any] = {"same": ToyScorer, "negated": Negated}
    plain, watched = (
        make(tmp_path / str(bool(x)), policy, AgainstBaseline(), watch=x) for x in ({}, watch)
    )
    for name in ("groups.jsonl", "columns.npy"):
        assert (plain.folder / name).read_bytes() == (watched.folder / name).read_bytes()
    found = watched.metrics
    assert found["rollout/watch/same"] == pytest.approx(found["rollout/weighted_score"])
    assert found["rollout/watch/same_correlation"] == pytest.approx(1)
    scores = np.concatenate([group.scores for group in watched.groups()])
    rewards = np.concatenate([group.rewards for group in watched.groups()])
    assert found["rollout/watch/negated"] == pytest.approx(-scores[:, 0].mean())
    correlation = np.corrcoef(-scores[:, 0], rewards)[0, 1]
    assert found["rollout/watch/negated_correlation"] == pytest.approx(correlation)
    assert -1 < correlation < -0.5


def test_the_table_has_the_responses_with_their_figures(
    tmp_path: Path, policy: str, other_policy: str
) -> None:
    rollouts = make(tmp_path, policy, AgainstBaseline(), reference=other_policy, prompts=12)
    columns, rows = response_table(rollouts)
    assert columns == [
        "prompt", "response", "letters", "length", "reward", "KL, nats", "tokens", "finish reason",
    ]  # fmt: skip
    every = flat(responses_of(rollouts))
    assert len(rows) == 8 * 4
    for row, response in zip(rows, every, strict=False):
        cells = dict(zip(columns, row, strict=True))
        log_ratio = response.columns["logprobs"] - response.columns["ref_logprobs"].astype(float)
        assert cells["KL, nats"] == pytest.approx(log_ratio.sum(), abs=1e-5)
        assert cells["reward"] == pytest.approx(response.reward)
        assert cells["tokens"] == len(response.ids)
        assert cells["finish reason"] == ("length" if response.unfinished else "stop")
        assert cells["prompt"] == f"user: {response.group.prompt[0]['content']}"
        assert cells["response"] in response.group.responses


def test_a_run_shows_its_path_and_leaves_groups_that_anyone_can_open(
    tmp_path: Path, policy: str
) -> None:
    run_dir = tmp_path / "run"
    Run(policy, rollouts={"watch": {"negated": Negated}}).train(run_dir)
    folders = sorted((run_dir / "rollouts").iterdir())
    made = [Rollouts(path) for path in folders]
    assert [one.folder.name for one in made] == [f"iteration_{i:06d}" for i in range(3)]
    for number, rollouts in enumerate(made):
        first_step = metrics(run_dir)[4 * number + 1]
        told = {name: first_step[name] for name in rollouts.metrics}
        assert told == pytest.approx(dict(rollouts.metrics), rel=1e-8, abs=1e-12)
    image = (run_dir / "plots/reward_against_kl.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    record = json.loads((run_dir / "result.json").read_text())["rollouts"]
    assert (record["iterations"], record["last"]) == (3, dict(made[-1].metrics))
    sampling = sum(one.record["seconds"]["sampling"] for one in made)
    assert record["seconds"]["sampling"] == pytest.approx(sampling)
    assert record["seconds"]["update"] > 0
    file = run_dir / "rollouts/iteration_000001/groups.jsonl"
    groups = list(read_all(GroupFiles(str(file)), "train"))
    assert groups == list(iteration(run_dir, 1).groups())
    for group in groups:
        assert len(group.responses) == len(group.rewards or ()) == 4
        assert group.score_names == ("letters", "length")
        assert [len(x) for x in group.response_ids or ()] == [len(x) for x in group.logprobs or ()]


def test_the_record_of_a_run_needs_the_records_of_its_iterations_alone(
    tmp_path: Path, policy: str
) -> None:
    run_dir = tmp_path / "run"
    Run(policy).train(run_dir)
    whole = summary_of(run_dir / "rollouts", 1.0)
    for folder in (run_dir / "rollouts").iterdir():
        shutil.rmtree(folder / "tokens")
        (folder / "columns.npy").unlink()
    assert summary_of(run_dir / "rollouts", 1.0) == whole
    assert summary_of(tmp_path, 1.0) == {"iterations": 0, "seconds": {"update": 1.0}}


def python_peak(folder: Path, policy: str, prompts: int) -> int:
    """Most bytes that Python and NumPy held at a time while an iteration was made."""
    settings: dict[str, Any] = {
        "data": ToyPrompts(prompts),
        "engine": LocalEngine(prompts_per_block=16, device="cpu"),
        "sampling": SamplingParams(n=4, max_tokens=64),
    }
    make(folder / "first", policy, GAE(), prompts=16, **settings)  # what is loaded once
    tracemalloc.start()
    try:
        make(folder / "measured", policy, GAE(), prompts=prompts, **settings)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rollouts(tmp_path: Path, policy: str) -> None:
    few, many = (python_peak(tmp_path / str(n), policy, n) for n in (32, 256))
    file = tmp_path / "256/measured/iteration_000000/groups.jsonl"
    # As objects the samples alone would take more than their file does. What may grow is a
    # kilobyte or so a prompt: its text, and three numbers a response.
    assert many - few < 0.7 * file.stat().st_size
