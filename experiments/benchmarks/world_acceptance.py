"""Does the made-up world serve the methods? Its own figures, a policy, and reward models on it.

    python -m experiments.benchmarks.world_acceptance --seeds 1 2 3

Figures of the texts: how much of the oracle's correctness the length of a response, its words, and
its words with those of its prompt tell (R² of linear predictors on prompts that they were not
fitted on; the best of several ridge penalties there, which flatters them). For each seed, with
the command line: `experiment=sft/world`, then `experiment=reward/world` from the policy, once on
the data and once on it with the prompts of other groups. The policy is sampled on validation
prompts and rated by the oracle; the reward models are compared with the oracle on other ones.
Intervals are 95 % and resample prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, AttributeWeights
from helpsteer2.data.groups import Group, read_all
from helpsteer2.data.sources.group_files import write_groups
from helpsteer2.evaluation.policies import EvaluatedPolicy
from helpsteer2.evaluation.scoring import EvaluationContext
from helpsteer2.evaluation.world_policy import WorldPolicyEvaluation
from helpsteer2.functional.statistics import (
    cluster_bootstrap,
    pairs_within,
    percentile_interval,
    r2,
    strict_wins,
)
from helpsteer2.generation.local import LocalEngine
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.records import environment, write_json_atomic
from helpsteer2.rewards.scorer import RewardScorer
from helpsteer2.world.oracle import rate
from helpsteer2.world.source import WorldSource

Array = npt.NDArray[np.float64]

RESULT = Path(__file__).parent / "results" / "world_acceptance.json"
WEIGHTS = AttributeWeights(
    "helpsteer2_rlhf", {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45}
)
SHUFFLED_PAIRS = 19_200
"""Pairs with the prompts of other groups; its validation loss stands still after half of them."""
SAMPLES = 10
POLICY_DATA = 1001
"""Seed of the prompts that policies answer."""
MIN_GAP = 1.0
"""Pairs count where the oracle's ratings differ by at least this much."""


def oracle_world(groups: int, seed: int) -> list[Group]:
    """Validation pairs with the oracle's ratings."""
    source = WorldSource(groups=1, seed=seed, validation_groups=groups, ratings="oracle")
    return list(read_all(source, "validation"))


def ratings_of(groups: Sequence[Group]) -> Array:
    """The oracle's ratings of every response, ``(R, A)``."""
    return np.array([rate(group.prompt, text) for group in groups for text in group.responses])


# What texts alone tell.


def text_figures(train: Sequence[Group], held_out: Sequence[Group]) -> dict[str, Any]:
    """R² of each linear predictor from texts, by attribute."""
    targets, expected = ratings_of(train), ratings_of(held_out)
    figures = {}
    for name, features in {"length": _lengths, "response_words": _response_words,
                           "prompt_and_response_words": _all_words}.items():  # fmt: skip
        vocabulary = sorted({word for bag in features(train) for word in bag})
        fit, test = (_matrix(features(part), vocabulary) for part in (train, held_out))
        by_penalty = np.array([
            [r2(column, rating) for column, rating in zip(predicted.T, expected.T, strict=True)]
            for predicted in (_ridge(fit, targets, test, penalty) for penalty in (0.1, 1, 10, 100))
        ])  # fmt: skip
        figures[name] = dict(zip(HELPSTEER2_ATTRIBUTES, by_penalty.max(0).tolist(), strict=True))
    return figures


def _lengths(groups: Sequence[Group]) -> Iterator[dict[str, float]]:
    for group in groups:
        for text in group.responses:
            words = len(text.split())
            yield {"words": words, "log": float(np.log1p(words)), "characters": len(text)}


def _response_words(groups: Sequence[Group]) -> Iterator[Counter[str]]:
    for group in groups:
        for text in group.responses:
            yield Counter(re.findall(r"\w+|\W", text))


def _all_words(groups: Sequence[Group]) -> Iterator[Counter[str]]:
    for group in groups:
        prompt = Counter(
            f"prompt {word}"
            for message in group.prompt
            for word in re.findall(r"\w+|[^\w\s]", message["content"])
        )
        for text in group.responses:
            yield prompt + Counter(re.findall(r"\w+|[^\w\s]", text))


def _matrix(bags: Iterator[Any], vocabulary: Sequence[str]) -> Array:
    """Features of every response, with a constant."""
    position = {word: i for i, word in enumerate(vocabulary)}
    rows = []
    for bag in bags:
        row = np.zeros(len(vocabulary) + 1)
        row[-1] = 1
        for word, value in bag.items():
            if word in position:
                row[position[word]] = value
        rows.append(row)
    return np.array(rows)


def _ridge(fit: Array, targets: Array, test: Array, penalty: float) -> Array:
    """Ratings predicted for ``test`` by ridge regression; the constant is not shrunk."""
    shrink = np.full(fit.shape[1], penalty)
    shrink[-1] = 0
    weights = np.linalg.lstsq(fit.T @ fit + np.diag(shrink), fit.T @ targets, rcond=None)[0]
    return np.asarray(test @ weights)


# The policy.


def policy_figures(folder: Path, groups: Sequence[Group], seed: int) -> dict[str, Any]:
    """The policy's place between the worst and the best answers, and what is left to gain."""
    evaluation = WorldPolicyEvaluation(
        WorldSource(groups=1, seed=POLICY_DATA, validation_groups=len(groups)),
        SamplingParams(n=SAMPLES, max_tokens=96, seed=seed),
    )
    context = EvaluationContext((WEIGHTS,), folder / "scores", None, 0, Console())
    policy = EvaluatedPolicy(str(folder), LocalEngine())
    result = evaluation.evaluate(policy, context=context)
    scores = result["weightings"][WEIGHTS.name]
    # The worst answers, empty ones for instance, are rated 0; the best ones all score the same.
    best = scores["best_answer"]["value"]
    return {
        "share_of_range": {end: value / best for end, value in scores["sampled"].items()},
        "gap_closed_by_best_of_10": scores["best_of_n_gap_closed"],
        "mean_ratings": {
            name: figures["sampled"]["value"] for name, figures in result["attributes"].items()
        },
        "mean_ratings_of_data": dict(
            zip(HELPSTEER2_ATTRIBUTES, ratings_of(groups).mean(0), strict=True)
        ),
        "examples": result["examples"],
    }


# The reward model.


def reward_figures(folder: Path, groups: Sequence[Group]) -> dict[str, Any]:
    """R² and pair accuracy of an exported reward model against the oracle, by attribute."""
    scorer = RewardScorer.from_pretrained(folder)
    scores = np.concatenate(list(scorer.score(groups))).astype(np.float64)
    ratings = ratings_of(groups)
    owners = np.repeat(np.arange(len(groups)), [len(group.responses) for group in groups])
    result = {}
    for i, name in enumerate(HELPSTEER2_ATTRIBUTES):
        score, rating = scores[:, i], ratings[:, i]
        pairs = pairs_within(owners)
        far = pairs[np.abs(rating[pairs[:, 0]] - rating[pairs[:, 1]]) >= MIN_GAP]
        wins = strict_wins(score, rating, far)
        fit = cluster_bootstrap(
            lambda rows, s=score, r=rating: r2(s[rows], r[rows]), owners, resamples=1000, seed=0
        )
        won = cluster_bootstrap(
            lambda rows, w=wins: w[rows].mean(), owners[far[:, 0]], resamples=1000, seed=0
        )
        result[name] = {
            "r2": percentile_interval(r2(score, rating), fit[:, 0]),
            "pair_accuracy": percentile_interval(float(wins.mean()), won[:, 0]),
            "pairs": len(far),
        }
    return result


def shuffled_prompts(folder: Path, seed: int) -> Path:
    """Write the world's groups with the prompt of the group before each."""
    source = WorldSource(groups=SHUFFLED_PAIRS, seed=seed, validation_groups=256)
    for split in ("train", "validation"):
        groups = list(read_all(source, split))
        others = [
            replace(group, prompt=groups[i - 1].prompt, annotations=None)
            for i, group in enumerate(groups)
        ]
        write_groups(folder / f"{split}.jsonl", others, source.attribute_names)
    return folder


def train(folder: Path, *overrides: str) -> dict[str, float]:
    """Train with the command line into a folder, or go on there; seconds it took."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "helpsteer2", "train", f"run_dir={folder}", *overrides]
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    record = json.loads((folder / "result.json").read_text())
    return {"wall_seconds": record["wall_seconds"]}


def one_seed(seed: int, out: Path, groups: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train and judge a policy and the reward models that start from it."""
    folder = out / f"seed_{seed}"
    policy, from_policy = folder / "sft", "backbone.path=" + str(folder / "sft" / "export")
    own = [f"seed={seed}", f"data.seed={seed}"]
    result: dict[str, Any] = {"sft": train(policy, "experiment=sft/world", *own, *overrides)}
    result["policy"] = policy_figures(policy / "export", oracle_world(groups, POLICY_DATA), seed)
    common = ["experiment=reward/world", from_policy]
    result["reward"] = train(folder / "reward", *common, *own, *overrides)
    unseen = oracle_world(4 * groups, 1002)
    result["reward_model"] = reward_figures(folder / "reward" / "export", unseen)
    data = shuffled_prompts(folder / "shuffled_data", seed)
    common = ["experiment=reward/world", from_policy, "data=groups", "~data.groups"]
    common.append(f"data.path={data}")
    train(folder / "shuffled", *common, f"seed={seed}", *overrides)
    result["shuffled_reward_model"] = reward_figures(folder / "shuffled" / "export", unseen)
    return result


def main() -> None:
    """Measure everything, print the judgement, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1], help="none: texts alone")
    parser.add_argument("--groups", type=int, default=200, help="prompts that are sampled")
    parser.add_argument("--out", type=Path, default=Path("outputs/world_acceptance"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--overrides", nargs="*", default=[], help="of every training")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    console = Console()
    fitted = WorldSource(groups=6000, seed=1000, validation_groups=1, ratings="oracle")
    texts = text_figures(list(read_all(fitted, "train")), oracle_world(2000, 1000))
    console.print({name: figures["correctness"] for name, figures in texts.items()})
    runs = {}
    for seed in options.seeds:
        runs[str(seed)] = one_seed(seed, options.out.resolve(), options.groups, options.overrides)
        console.print(runs[str(seed)])
    write_json_atomic(
        options.result,
        {
            "command": "python -m experiments.benchmarks.world_acceptance "
            + " ".join(sys.argv[1:]),
            "bounds": {
                "length_r2_of_correctness": "<= 0.2",
                "words_r2_of_correctness": "<= 0.4",
                "shuffled_reward_model_r2_of_correctness": "<= 0.2",
                "policy_share_of_range": "0.35 to 0.65",
                "gap_closed_by_best_of_10": ">= 0.3",
                "reward_model_r2": "verbosity, correctness >= 0.85; helpfulness >= 0.75",
                "reward_model_pair_accuracy": ">= 0.9",
            },
            "texts": texts,
            "seeds": runs,
            "environment": environment(),
        },
    )
    console.print(f"wrote {options.result}")


if __name__ == "__main__":
    main()
