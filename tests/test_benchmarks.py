"""The speed benchmark counts right and runs; what it measures is no matter for tests."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.benchmarks.reward_step.cost import SIZES, Tally, packed_pairs, training_flops
from experiments.benchmarks.reward_step.job import FINGERPRINT, Job, row_lengths
from experiments.benchmarks.reward_step.summary import Heat, summarise
from helpsteer2.data.packing import pack
from helpsteer2.data.token_store import TokenWriter
from helpsteer2.data.tokens import TokenGroup

ROOT = Path(__file__).resolve().parent.parent


def make_group(index: int, prompt: int, *responses: int) -> TokenGroup:
    ids = [np.ones(n, dtype=np.int32) for n in (prompt, *responses)]
    ratings = np.zeros((len(responses), 5), dtype=np.float32)
    return TokenGroup(ids[0], tuple(ids[1:]), ratings, 1.0, index)


def test_packed_pairs_are_those_of_the_mask() -> None:
    batch = pack([make_group(0, 5, 3, 7), make_group(1, 1, 4), make_group(2, 2, 1, 1, 6)])
    same_group = batch.group_ids[:, None] == batch.group_ids[None]
    same_segment = batch.segment_ids[:, None] == batch.segment_ids[None]
    in_prompt = batch.segment_ids[None] == 0
    causal = batch.position_ids[:, None] >= batch.position_ids[None]
    mask = same_group & (same_segment | in_prompt) & causal
    assert packed_pairs(batch.layout) == int(mask.sum())


def test_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModel

    size, rows, length = SIZES["XS"], 3, 17
    config = AutoConfig.for_model(**size.config())
    model = AutoModel.from_config(config, attn_implementation="eager")
    ids = torch.randint(0, 8192, (rows, length))
    with FlopCounterMode(display=False) as counter:
        model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state.sum().backward()
    expected = training_flops(size, rows * length, rows * length**2)
    # Beside them torch counts the product that makes the rotary angles.
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_shared_prompts_and_padding_are_counted_apart() -> None:
    packed, padded = Tally(), Tally()
    packed.add_packed(SIZES["S"], pack([make_group(0, 10, 5, 20)]).layout)
    padded.add_padded(SIZES["S"], [15, 30], 32, recomputed=True)
    assert packed.groups == padded.groups == 1
    assert packed.real_tokens == padded.real_tokens == 45
    assert (packed.executed_tokens, padded.executed_tokens) == (35, 64)
    assert packed.model_flops == packed.executed_flops < padded.model_flops
    assert padded.executed_flops > 4 / 3 * 64 / 45 * padded.model_flops


def test_length_grouping_keeps_the_groups_and_saves_padding(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    size = SIZES["S"]
    groups = [make_group(i, *rng.integers(4, 400, size=3)) for i in range(6 * 32)]
    with TokenWriter(tmp_path / "groups", ["a", "b", "c", "d", "e"]) as writer:
        for group in groups:
            writer.add(group, str(group.index))
        writer.finish(FINGERPRINT, {})
    nothing: Any = None
    job = Job(size, "fp32", tmp_path / "groups", nothing, nothing, 1, 5, 8192)
    order, grouped = job.order(), job.grouped_order()
    first = size.groups_per_step
    assert sorted(order[:first]) == sorted(grouped[:first])
    assert sorted(order[first:]) == sorted(grouped[first:])

    def padded(indices: np.ndarray) -> int:
        longest = np.array([max(row_lengths(groups[i])) for i in indices])
        return int(longest.reshape(-1, 8).max(axis=1).sum()) * 16

    assert padded(grouped[first:]) < 0.8 * padded(order[first:])


def test_figures_do_not_feel_drifts_and_stalls_of_the_machine() -> None:
    drift = [1.0, 3.0, 1.5, 0.5, 1.0]
    tokens = [1000, 1500, 500, 2000, 700]

    def turns(speed: float) -> list[dict[str, Any]]:
        return [
            {
                "seconds": n / speed * slow,
                "groups": 4,
                "real_tokens": n,
                "executed_tokens": n,
                "model_flops": 10.0 * n,
                "executed_flops": 10.0 * n,
                "rows": 1,
                "peak_mib": 1.0,
            }
            for slow, n in zip(drift, tokens, strict=True)
        ]

    rates = [{"square": 40_000 / slow, "layers": 20_000 / slow} for slow in drift]
    figures = summarise(
        [
            Heat({"ours": turns(2000.0), "peer": turns(500.0)}, rates),
            Heat({"ours": turns(2000.0), "other": turns(1000.0)}, rates),
        ],
        "ours",
    )
    assert figures["other"]["ours_is_faster"]["per_round"]["median"] == pytest.approx(2.0)
    assert len(figures["ours"]["rounds"]["seconds"]) == 2 * len(tokens)
    faster = figures["peer"]["ours_is_faster"]
    assert faster["per_round"]["q1"] == pytest.approx(4.0)
    assert faster["per_round"]["q3"] == pytest.approx(4.0)
    assert faster["medians"] == pytest.approx(4.0)
    assert faster["total"] == pytest.approx(4.0)
    mean_group = sum(tokens) / (4 * len(tokens))
    assert figures["ours"]["groups_per_second"]["median"] == pytest.approx(2000 / mean_group)
    shares = figures["ours"]["share_of_matmul_rate"]
    assert shares["square"]["median"] == pytest.approx(0.5)
    assert shares["layers"]["median"] == pytest.approx(1.0)

    stalled = turns(500.0)
    stalled[1]["seconds"] *= 20
    faster = summarise([Heat({"ours": turns(2000.0), "peer": stalled}, rates)], "ours")["peer"]
    assert faster["ours_is_faster"]["per_round"]["median"] == pytest.approx(4.0)
    assert faster["ours_is_faster"]["total"] > 8

    other = turns(500.0)
    other[0]["real_tokens"] += 1
    with pytest.raises(ValueError, match="different groups"):
        summarise([Heat({"ours": turns(2000.0), "peer": other}, rates)], "ours")


def run_benchmark(name: str, output: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"experiments.benchmarks.{name}", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HELPSTEER2_REAL_DATA", None)
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_reward_step_runs(tmp_path: Path) -> None:
    record = run_benchmark(
        "reward_step",
        tmp_path / "record.json",
        *"--size XS --dtype fp32 --rounds 2 --warmup 1 --threads 1".split(),
        *"--peers trl_grouped_4".split(),
    )
    (case,) = record["cases"]
    assert set(case["contenders"]) == {"ours", "trl_grouped_4"}
    for figures in case["contenders"].values():
        assert len(figures["rounds"]["seconds"]) == 2
        assert figures["groups_per_second"]["median"] > 0
        assert figures["peak_mib"] is None or figures["peak_mib"] > 0  # None: not Linux
    assert case["contenders"]["ours"]["padding_share"] == 0
    assert case["contenders"]["trl_grouped_4"]["padding_share"] > 0
    assert {"torch", "trl", "transformers"} <= set(record["environment"]["packages"])
    assert record["command"].startswith("python -m experiments.benchmarks.reward_step")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_dpo_step_runs(tmp_path: Path) -> None:
    record = run_benchmark(
        "dpo_step",
        tmp_path / "record.json",
        *"--size XS --dtype fp32 --rounds 2 --warmup 1 --threads 1 --vocabulary 9000".split(),
        *"--peers trl_defaults trl_precomputed trl_grouped_4 --at-once 3".split(),
    )
    (case,) = record["cases"]
    assert case["model"]["vocab_size"] == 9000
    assert set(case["contenders"]) == {
        "ours", "ours_reference", "trl_defaults", "trl_precomputed", "trl_grouped_4",
    }  # fmt: skip
    for figures in case["contenders"].values():
        assert len(figures["rounds"]["seconds"]) == 2
        assert figures["groups_per_second"]["median"] > 0
    assert case["memory"]["state_mib"] > 0
    assert "ours_reference" not in case["memory"]["peak_above_state_mib"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_lora_step_runs(tmp_path: Path) -> None:
    options = "--size XS --rounds 2 --warmup 1 --threads 1 --adapters default all_linear".split()
    record = run_benchmark("lora_step", tmp_path / "record.json", *options)
    (case,) = record["cases"]
    assert set(case["contenders"]) == {"full", "default", "all_linear"}
    for figures in case["contenders"].values():
        assert len(figures["rounds"]) == 2
        assert figures["full_over_own"]["per_round"]["median"] > 0
    assert case["contenders"]["full"]["full_over_own"]["total"] == 1
    assert case["contenders"]["full"]["memory_share"] == 1


@pytest.mark.slow
def test_planning_runs(tmp_path: Path) -> None:
    options = "--groups 640 --rows 200 4000".split()
    record = run_benchmark("planning", tmp_path / "record.json", *options)
    assert record["planning"]["steps"] == 10
    small, large = record["memory"]
    assert large["mib_on_disk"] > 10 * small["mib_on_disk"]
    if large["private_mib"] is not None:  # None where the system is not Linux
        assert large["private_mib"] < large["mib_on_disk"] / 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="fastapi is not installed")
def test_http_scoring_runs(tmp_path: Path) -> None:
    options = "--size XS --rounds 2 --warmup 1 --groups 40 --clients 8 --threads 1".split()
    record = run_benchmark("http_scoring", tmp_path / "record.json", *options)
    (case,) = record["cases"]
    assert len(case["rounds"]["http"]) == len(case["rounds"]["in_process"]) == 2
    assert case["throughput_share"]["per_round"]["median"] > 0
    assert case["latency_seconds"]["p99"] >= case["latency_seconds"]["p50"] > 0
    assert case["largest_difference"] < 1e-4


@pytest.mark.slow
def test_sampling_runs(tmp_path: Path) -> None:
    options = ["--size", "XS", "--rounds", "1", "--warmup", "0", "--prompts", "2", "--n", "3"]
    options += ["--max-tokens", "4", "--max-rows", "6", "--generate", "2", "--profile"]
    record = run_benchmark("sampling", tmp_path / "sampling.json", *options)
    [case] = record["cases"]
    assert set(case["contenders"]) == {"ours_6", "generate_6_dynamic", "yardstick"}
    ours = case["contenders"]["ours_6"]
    assert ours["times_generate"]["fastest"] == "generate_6_dynamic"
    assert ours["roofline"]["median"] > 0
    assert sum(case["profiles"]["ours_6"].values()) == pytest.approx(1)


@pytest.mark.slow
def test_exact_optima_runs(tmp_path: Path) -> None:
    options = ["--iterations", "2", "--copies", "1"]
    record = run_benchmark("exact_optima", tmp_path / "record.json", *options)
    assert len(record["runs"]) == 20
    assert all(0 < run["reward"] < run["best_reward"] <= 1 for run in record["runs"])
    assert record["command"].startswith("python -m experiments.benchmarks.exact_optima")
