"""The benchmark of SteerLM 2.0 compares equal computations, counts right and runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.benchmarks.reward_step.cost import SIZES
from experiments.benchmarks.reward_step.job import Corpus, load_corpus
from experiments.benchmarks.steerlm2_step.job import RESPONSES, draw, make_job, prompts_of
from experiments.benchmarks.steerlm2_step.padded import (
    Count,
    Prompt,
    Row,
    Setting,
    backward,
    token_logprobs,
)
from experiments.benchmarks.steerlm2_step.summary import (
    differences,
    fastest,
    slower_ones,
    summarise,
)

ROOT = Path(__file__).resolve().parent.parent

SETTINGS = [
    Setting(rows=3, careful=False),
    Setting(rows=1),
    Setting(rows=2),
    Setting(rows=4),
    Setting(rows=2, two_passes=True),
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for n_prompt, lengths in ((5, (1, 7, 3)), (2, (4, 4, 9)), (8, (2, 6, 1))):
        rows = [
            Row(torch.randint(0, 40, (n_prompt + n,), generator=generator), n_prompt)
            for n in lengths
        ]
        reference, targets = torch.randn(2, 3, generator=generator) - 20
        made.append(Prompt(rows, reference, targets))
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(None, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_logprobs_are_those_of_each_row_read_alone(
    model: LlamaForCausalLM, prompts: list[Prompt], setting: Setting
) -> None:
    rows = [row for prompt in prompts for row in prompt.rows]
    count = Count()
    with torch.no_grad():
        found = token_logprobs(model, rows, setting, count)
        for row, own in zip(rows, found, strict=True):
            logprobs = model(input_ids=row.ids[None]).logits[0].log_softmax(-1)
            expected = [
                logprobs[place - 1, token]
                for place, token in enumerate(row.ids.tolist())
                if place >= row.n_prompt
            ]
            torch.testing.assert_close(own, torch.stack(expected))
    assert count.real == sum(len(row.ids) for row in rows)
    assert (count.executed == count.real) == (setting.rows == 1)


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_are_those_of_the_papers_formula(
    model: LlamaForCausalLM, prompts: list[Prompt], setting: Setting
) -> None:
    def gradient() -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    model.zero_grad()
    distance, terms = 0.0, []
    for prompt in prompts:
        sums = torch.stack(
            [
                -model(row.ids[None], labels=_learned(row)[None]).loss * _length(row)
                for row in prompt.rows
            ]
        )
        ratios = (prompt.log_targets - prompt.ref_logprobs).double().exp()
        target = ratios / ratios.sum()
        ratios = (sums.detach() - prompt.ref_logprobs).exp()
        policy = ratios / ratios.sum()
        distance += float((target * (target / policy).log()).sum()) / 3
        terms.append(-((target - policy) * sums).sum() / 3)
    torch.stack(terms).sum().backward()
    expected = gradient()
    model.zero_grad()
    assert backward(model, prompts, setting, Count()) == pytest.approx(distance, rel=1e-4)
    assert float((gradient() - expected).norm() / expected.norm()) < 1e-4


def _learned(row: Row) -> torch.Tensor:
    """Labels as transformers' own loss takes them."""
    return torch.where(torch.arange(len(row.ids)) < row.n_prompt, -100, row.ids)


def _length(row: Row) -> int:
    return len(row.ids) - row.n_prompt


def test_prompts_have_ten_responses_of_the_data_and_labels_stand_between(corpus: Corpus) -> None:
    plain, labelled = draw(corpus, prompts_of(corpus), 30)
    texts = {ids.tobytes() for group in corpus.groups for ids in group.response_ids}
    starts = {group.prompt_ids.tobytes() for group in corpus.groups}
    labels = set()
    for group, same in zip(plain, labelled, strict=True):
        assert len(group.response_ids) == RESPONSES
        assert group.prompt_ids.tobytes() in starts
        assert all(ids.tobytes() in texts for ids in group.response_ids)
        assert same.response_ids == group.response_ids
        n = len(group.prompt_ids)
        np.testing.assert_array_equal(same.prompt_ids[:n], group.prompt_ids)
        label = corpus.tokenizer.decode(same.prompt_ids[n:])
        assert label.startswith("helpfulness:")
        assert label.endswith("\n")
        labels.add(label)
    assert len(labels) > 20
    again, _ = draw(corpus, prompts_of(corpus), 30)
    assert [g.prompt_ids.tobytes() for g in again] == [g.prompt_ids.tobytes() for g in plain]


def test_a_job_has_uneven_weights_that_no_response_has_alone(
    corpus: Corpus, tmp_path: Path
) -> None:
    job = make_job(
        corpus,
        tmp_path / "job",
        size=replace(SIZES["XS"], groups_per_step=4),
        warmup_steps=1,
        measured_steps=2,
        tokens_per_microbatch=2048,
    )
    assert sorted(job.steps().flatten()) == list(range(12))
    assert job.steps().shape == (3, 4)
    largest = []
    for group in job.groups():
        assert group.rewards is not None
        assert group.ref_logprobs is not None
        weights = torch.from_numpy(group.rewards - group.ref_logprobs).softmax(0)
        largest.append(float(weights.max()))
    assert 0.2 < np.mean(largest) < 0.7
    for plain, labelled in zip(job.plain_groups(), job.groups(), strict=True):
        assert len(plain.prompt_ids) < len(labelled.prompt_ids)


def turns(seconds: float) -> list[dict[str, Any]]:
    """Rounds on a machine that drifts."""
    return [
        {
            "seconds": seconds * slow,
            "responses": 20,
            "executed_tokens": 400,
            "real_tokens": 300,
            "peak_mib": 1.0,
        }
        for slow in (1.0, 3.0, 0.5)
    ]


def test_together_adds_the_times_of_both_phases() -> None:
    scoring = {"ours": turns(1), "usual": turns(5), "single": turns(2), "sorted_4": turns(3)}
    training = {"ours": turns(3), "usual": turns(11), "single": turns(9), "sorted_2": turns(7)}
    figures = summarise({"scoring": scoring, "training": training})
    together = figures["together"]
    assert together["ours"]["responses_per_second"]["median"] == pytest.approx(20 / 4)
    for name, ratio in (("usual", 16 / 4), ("fastest_padded", 10 / 4), ("fastest", 9 / 4)):
        faster = together[name]["ours_is_faster"]
        assert faster["per_round"]["q1"] == pytest.approx(ratio)
        assert faster["per_round"]["q3"] == pytest.approx(ratio)
        assert faster["total"] == pytest.approx(ratio)
    assert together["fastest"]["settings"] == {"scoring": "single", "training": "sorted_2"}
    usual = figures["phases"]["training"]["usual"]
    assert usual["ours_is_faster"]["total"] == pytest.approx(11 / 3)
    assert usual["padding_share"] == pytest.approx(0.25)
    assert usual["executed_tokens_per_response"] == 20


def test_peers_that_pad_go_on_as_well_as_the_fastest() -> None:
    seconds = {"ours": 9.0, "usual": 8.0, "single": 1.0, "sorted_2": 3.0, "sorted_4": 2.0}
    assert slower_ones(seconds, 1) == ["sorted_2"]
    assert slower_ones(seconds, 2) == []
    assert slower_ones({**seconds, "single": 5.0}, 1) == ["sorted_2", "single"]
    arrays = {name: np.array([value, value]) for name, value in seconds.items()}
    assert fastest(arrays, ("ours", "single")) == "sorted_4"
    assert fastest({"ours": np.ones(1)}, ("ours",)) is None


def test_contenders_that_compute_other_numbers_are_not_compared() -> None:
    ours, near = np.array([-1.0, -2.0]), np.array([-1.0, -2.00005])
    found = differences("scoring", {"ours": {"logprobs": ours}, "peer": {"logprobs": near}})
    assert found["peer"]["logprob"] == pytest.approx(5e-5)
    for wrong in (ours + 2e-4, ours * np.nan):
        with pytest.raises(ValueError, match="different numbers"):
            differences("scoring", {"ours": {"logprobs": ours}, "peer": {"logprobs": wrong}})
    with pytest.raises(ValueError, match="different responses"):
        differences("scoring", {"ours": {"logprobs": ours}, "peer": {"logprobs": ours[:1]}})
    step = {"loss": 0.5, "gradient_norm": 200.0}
    differences("training", {"ours": step, "peer": {**step, "gradient_norm": 200.01}})
    with pytest.raises(ValueError, match="different numbers"):
        differences("training", {"ours": step, "peer": {**step, "loss": 0.5001}})


@pytest.mark.slow
def test_steerlm2_step_runs(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    command = [sys.executable, "-m", "experiments.benchmarks.steerlm2_step", "--size", "XS"]
    command += "--prompts 2 --rounds 2 --warmup 1 --threads 1".split()
    command += ["--peers", "usual", "single", "sorted_4", "two_passes_4", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HELPSTEER2_REAL_DATA", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text(encoding="utf-8"))
    [case] = record["cases"]
    assert {"ours", "usual", "fastest", "fastest_padded"} == set(case["together"])
    for phase, contenders in case["phases"].items():
        assert {"ours", "usual"} < set(contenders)
        shared = contenders["ours"]["executed_tokens_per_response"]
        assert shared < contenders["usual"]["executed_tokens_per_response"] / 2
        for name, own in contenders.items():
            assert len(own["rounds"]["seconds"]) == 2
            assert own["responses_per_second"]["median"] > 0
            if name != "ours":
                for apart in case["equality"]["largest_differences"][phase][name].values():
                    assert apart <= 1e-4
    assert len(case["warmup_seconds"]["training"]["two_passes_4"]) == 1
    assert record["command"].startswith("python -m experiments.benchmarks.steerlm2_step")
