"""Tiny training runs, in this process or in one of their own that can be killed.

The children come from a fork server that has imported everything heavy, so they start at once.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from helpsteer2.callbacks.checkpoints import Cadence
from helpsteer2.commands.train import train
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.datamodule import Batching
from helpsteer2.data.groups import Group
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.tokenizer import PretrainedTokenizer, TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.losses.dpo import DPOLoss
from helpsteer2.losses.preference import ScaledBradleyTerry
from helpsteer2.losses.regression import RegressionLoss
from helpsteer2.losses.sft import SFTLoss
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.lora import Lora
from helpsteer2.models.start import PolicyStart, RewardStart
from helpsteer2.modules.dpo import DPOModule
from helpsteer2.modules.preference import PreferenceModule
from helpsteer2.modules.regression import RegressionModule
from helpsteer2.modules.sft import SFTModule
from helpsteer2.modules.step import StepModule

ROOT = Path(__file__).parents[2]
NAMES = ("helpfulness", "verbosity")
WORDS = ("red", "green", "blue", "one", "two", "three", "sun", "moon", "star", "hill", "tree")
SHAPE = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@dataclass(frozen=True)
class ToyGroups:
    """Pairs whose longer response is rated more verbose and preferred; some ratings are unknown."""

    seed: int = 0
    n: int = 40
    attribute_names: tuple[str, ...] = NAMES

    def read(self, split: str, report: Any) -> Iterator[Group]:
        rng = np.random.default_rng([self.seed, len(split)])
        for i in range(self.n if split == "train" else 9):
            lengths = [int(length) for length in rng.integers(1, 30, size=2)]
            yield Group(
                id=f"{split}-{i}",
                source=f"toy:{i}",
                prompt=({"role": "user", "content": " ".join(rng.choice(WORDS, 5))},),
                responses=tuple(" ".join(rng.choice(WORDS, length)) for length in lengths),
                attributes=tuple(
                    (None if rng.random() < 0.3 else float(rng.integers(0, 5)), 4 * length / 30)
                    for length in lengths
                ),
                preference_strength=max(-3, min(3, round((lengths[1] - lengths[0]) / 5))),
            )

    def fingerprint(self, split: str) -> str:
        return hashlib.sha256(f"{self.seed} {self.n} {split}".encode()).hexdigest()


def backbone(lora: Lora | None = None, path: str | None = None) -> Backbone:
    """A random decoder, or that of a folder."""
    if path is not None:
        return Backbone(PretrainedTokenizer(path), path=path, lora=lora)
    return Backbone(TrainedTokenizer(270), init="random", config=SHAPE, lora=lora)


def module_of(kind: str, optimizer: Any) -> partial[StepModule]:
    """What makes a LightningModule of a kind around a model."""
    if kind == "regression":
        return partial(RegressionModule, loss=RegressionLoss(), optimizer=optimizer, warmup_steps=4)
    if kind == "sft":
        return partial(SFTModule, loss=SFTLoss(), optimizer=optimizer, warmup_steps=4)
    if kind == "dpo":
        return partial(DPOModule, loss=DPOLoss(), optimizer=optimizer, warmup_steps=4)
    return partial(PreferenceModule, loss=ScaledBradleyTerry(), optimizer=optimizer, warmup_steps=4)


def arguments(run_dir: Path, **options: Any) -> dict[str, Any]:
    """Arguments of ``train``, with a ``config`` that says what the options are."""
    chosen = {
        "max_steps": 12, "validate_every": 5, "checkpoint_every": 3, "export": "best", "lr": 3e-3,
        "tokens": 200, "precision": "32-true", "devices": 1, "seed": 1, "data_seed": 0,
        "optimized_metric": "val/loss", "trainer": {}, "wandb": None, "lora": None,
        "module": "regression", "policy": None, "reference": None,
    } | options  # fmt: skip
    optimizer = partial(torch.optim.AdamW, lr=chosen["lr"], betas=(0.9, 0.98), fused=True)
    return {
        "run_dir": str(run_dir),
        "seed": chosen["seed"],
        "model": PolicyStart() if chosen["module"] in ("sft", "dpo") else RewardStart(),
        "backbone": backbone(chosen["lora"], chosen["policy"]),
        "data": ToyGroups(seed=chosen["data_seed"]),
        "chat": ChatFormat(),
        "lengths": LengthLimits(max_prompt_tokens=64, max_response_tokens=128),
        "batching": Batching(
            global_batch=6, tokens_per_microbatch=chosen["tokens"], max_steps=chosen["max_steps"]
        ),
        "attributes": list(NAMES) if chosen["module"] == "regression" else ["reward"],
        "module": module_of(chosen["module"], optimizer),
        "trainer": partial(
            pl.Trainer,
            accelerator="cpu",
            devices=chosen["devices"],
            strategy="ddp" if chosen["devices"] > 1 else "auto",
            precision=chosen["precision"],
            **chosen["trainer"],
        ),
        "schedule": Cadence(
            chosen["validate_every"], chosen["checkpoint_every"], export=chosen["export"]
        ),
        "cache_dir": str(Path(run_dir).parent / "cache"),
        "reference": chosen["reference"],
        "logger": chosen["wandb"],
        "optimized_metric": chosen["optimized_metric"],
        "config": {
            "run_dir": str(run_dir),
            "seed": chosen["seed"],
            "optimized_metric": chosen["optimized_metric"],
            "batching": {
                "max_steps": chosen["max_steps"],
                "tokens_per_microbatch": chosen["tokens"],
            },
            "module": {"kind": chosen["module"], "optimizer": {"lr": chosen["lr"]}},
            "trainer": {"devices": chosen["devices"], "precision": chosen["precision"]},
            "schedule": {
                "validate_every": chosen["validate_every"],
                "checkpoint_every": chosen["checkpoint_every"],
                "export": chosen["export"],
            },
        },
    }


class Child:
    """A function in a process of its own, its output in a file."""

    def __init__(
        self,
        target: Callable[..., Any],
        output: Path,
        *args: Any,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        self.output = output
        self.process: BaseProcess = context.Process(
            target=_child, args=(target, str(output), dict(environment or {}), args)
        )
        self.process.start()

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def join(self, expected: int = 0) -> str:
        """Wait for its end; what it printed."""
        self.process.join(200)
        if self.process.exitcode != expected:
            self.process.kill()
            raise AssertionError(f"exit code {self.process.exitcode}:\n{self.text}")
        return self.text

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 200
        while not condition():
            if not self.process.is_alive() or time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"it did not happen:\n{self.text}")
            time.sleep(0.002)


def _child(
    target: Callable[..., Any], output: str, environment: dict[str, str], args: tuple[Any, ...]
) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(target(*args))


def run(run_dir: Path, options: dict[str, Any]) -> int:
    """Train; print the metric and return an exit code, as the command line does."""
    seconds = options.pop("step_seconds", 0.0)
    if seconds:
        slow_down(seconds)
    try:
        value = train(**arguments(run_dir, **options))
    except UserError as error:
        print(f"UserError: {error}")
        return error.exit_code
    print(f"value {value}", flush=True)
    return 0


def start(run_dir: Path, **options: Any) -> Child:
    """Train in a child; its output goes beside the run's folder."""
    return Child(run, run_dir.with_suffix(".out"), run_dir, options)


def start_ranks(target: Callable[..., Any], folder: Path, *args: Any) -> list[Child]:
    """Start a function on two ranks, with the environment that torchrun gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    return [
        Child(
            target,
            folder / f"rank{rank}.out",
            *args,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def slow_down(seconds: float) -> None:
    """Make every micro-batch take longer, so that a signal finds the run where it is wanted."""
    for module in StepModule.__subclasses__():

        def slow(self: Any, batch: Any, inner: Any = module.loss_sums) -> Any:
            time.sleep(seconds)
            return inner(self, batch)

        module.loss_sums = slow  # type: ignore[method-assign]
