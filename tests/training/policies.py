"""Policies of the toy groups, and what they say of them, for runs that compare with a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpsteer2.commands.reference import reference
from helpsteer2.commands.train import train
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.tokenizer import PretrainedTokenizer
from tests.training.runs import ToyGroups, arguments
from tests.training.test_step import LIMITS


def train_policy(folder: Path, **options: Any) -> str:
    """A policy that has learned next to nothing, as a folder."""
    settings = {"module": "sft", "max_steps": 3, "validate_every": None, "optimized_metric": None}
    train(**arguments(folder / "sft", **settings | options))
    return str(folder / "sft/export")


def refer(folder: Path, policy: str, **changes: Any) -> str:
    """Compute what a policy says of the toy groups, as ``helpsteer2 reference`` does."""
    settings: dict[str, Any] = {
        "run_dir": str(folder), "model": policy, "tokenizer": PretrainedTokenizer(policy),
        "data": ToyGroups(), "splits": ["train", "validation"], "chat": ChatFormat(),
        "lengths": LIMITS, "dtype": "float32", "precision": "32-true", "attention": "auto",
        "tokens_per_microbatch": 130, "cache_dir": str(folder.parent / "cache"),
    }  # fmt: skip
    reference(**settings | changes)
    return str(folder / "reference")


def dpo(run_dir: Path, policy: str, reference: str | None, **options: Any) -> dict[str, Any]:
    settings = {"module": "dpo", "policy": policy, "reference": reference, "max_steps": 2}
    return arguments(run_dir, **settings | {"validate_every": 2} | options)


def first_loss(run_dir: Path) -> float:
    lines = (run_dir / "metrics.csv").read_text().splitlines()
    [value] = [float(line.split(",")[2]) for line in lines if line.startswith("1,train/loss,")]
    return value
