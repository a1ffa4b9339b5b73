"""Five-fold cross-validation of the small reward model on real HelpSteer2 rows, on the CPU.

    HELPSTEER2_REAL_DATA=DIR python -m experiments.benchmarks.slice_folds

Every pair of DIR/helpsteer2_slice (train and validation) is scored once, by the model of the fold
that did not train on its prompt. The weights are those of the last step, so no checkpoint is chosen
on the reported rows. The length-only and mean predictors are fitted on the reported rows
themselves, which flatters them, never us. Intervals are 95 % and resample prompts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, AttributeWeights
from helpsteer2.data.groups import Group, GroupSource, Report
from helpsteer2.data.sources.folds import fold_of
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.evaluation.ratings import RatingEvaluation
from helpsteer2.evaluation.scoring import EvaluationContext
from helpsteer2.records import environment, write_json_atomic
from helpsteer2.rewards.rewarder import Scores
from helpsteer2.rewards.scorer import RewardScorer

SPLITS = ("train", "validation")
WEIGHTINGS = (
    AttributeWeights("helpfulness_only", {"helpfulness": 1.0}),
    AttributeWeights("uniform", dict.fromkeys(HELPSTEER2_ATTRIBUTES, 1.0)),
)
RESULT = Path(__file__).parent / "results" / "slice_folds.json"


@dataclass(frozen=True)
class AllRows:
    """Both splits of a source as one."""

    of: GroupSource

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the source's attributes."""
        return self.of.attribute_names

    def read(self, split: str, report: Report) -> Iterator[Group]:
        """Stream every group, whatever the split is called."""
        for part in SPLITS:
            yield from self.of.read(part, report)

    def fingerprint(self, split: str) -> str:
        """Fingerprints of both splits."""
        return "+".join(self.of.fingerprint(part) for part in SPLITS)


class OutOfFold:
    """Scores each group with the model of the fold that held its prompt out."""

    def __init__(self, exports: list[Path]) -> None:
        self._scorers = [RewardScorer.from_pretrained(str(path)) for path in exports]
        self.attribute_names = self._scorers[0].attribute_names

    def score(self, groups: Iterable[Group]) -> Iterator[Scores]:
        """Yield ``(n, A)`` scores a group, in order."""
        everything = list(groups)
        folds = [fold_of(group.prompt, len(self._scorers)) for group in everything]
        found: dict[int, Scores] = {}
        for fold, scorer in enumerate(self._scorers):
            members = [i for i, own in enumerate(folds) if own == fold]
            scores = scorer.score(everything[i] for i in members)
            found.update(zip(members, scores, strict=True))
        yield from (found[i] for i in range(len(everything)))


def train_fold(fold: int, folds: int, data: Path, out: Path, overrides: list[str]) -> Path:
    """Train on all folds but one with the command line, on one thread; return the export."""
    run_dir = out / f"fold_{fold}"
    command = [
        sys.executable, "-m", "helpsteer2", "train", "experiment=reward/local_slice", "data=folds",
        f"data.of.path={data}", f"data.folds={folds}", f"data.fold={fold}", f"run_dir={run_dir}",
        "schedule.validate_every=null", "optimized_metric=null", *overrides,
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with (out / f"fold_{fold}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, **threads})
    return run_dir / "export"


def headline(attributes: dict[str, Any]) -> dict[str, Any]:
    """The figures of the claim: pair accuracy beside length-only, and the gain over the mean."""
    rows = {}
    for name, figures in attributes.items():
        model, length = figures["predictors"]["model"], figures["predictors"]["length"]
        rows[name] = {
            "pair_accuracy": model["pairs"]["accuracy"],
            "pair_accuracy_length_only": length["pairs"]["accuracy"],
            **figures["differences"],
        }
    return rows


def main() -> None:
    """Train the folds, two at a time, and evaluate all rows once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("outputs/slice_folds"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", help="more overrides of `helpsteer2 train`")
    options = parser.parse_args()
    data = Path(os.environ["HELPSTEER2_REAL_DATA"]) / "helpsteer2_slice"
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(train_fold, fold, options.folds, data, options.out, options.overrides)
            for fold in range(options.folds)
        ]
        exports = [job.result() for job in jobs]
    trained = time.monotonic() - start
    rows = AllRows(HelpSteer2(str(data)))
    evaluation = RatingEvaluation(rows, split="all", train_split=None)
    console = Console(width=100)
    context = EvaluationContext(WEIGHTINGS, options.out / "scores", None, seed=0, console=console)
    result = evaluation.evaluate(OutOfFold(exports), context)
    for table in evaluation.tables(result):
        console.print(table)
    write_json_atomic(
        options.result,
        {
            "command": "python -m experiments.benchmarks.slice_folds "
            + " ".join(f"'{o}'" for o in options.overrides),
            "folds": options.folds,
            "headline": headline(result["attributes"]),
            "ratings": {key: value for key, value in result.items() if key != "fingerprint"},
            "train_seconds": round(trained),
            "total_seconds": round(time.monotonic() - start),
            "environment": environment(),
        },
    )
    console.print(f"wrote {options.result}")


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
