"""Tiny on-policy runs: prompts, scorers that count, and arguments of ``train``."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from helpsteer2.attributes import AttributeWeights
from helpsteer2.callbacks.checkpoints import Cadence
from helpsteer2.commands.train import train
from helpsteer2.data.groups import Group
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.generation.local import LocalEngine
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.losses.policy_gradient import ClippedLoss, PolicyGradientLoss
from helpsteer2.losses.value import ValueLoss
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.critic import Critic, CriticStart
from helpsteer2.models.policy import Policy
from helpsteer2.models.start import PolicyStart
from helpsteer2.modules.ppo import PPOModule
from helpsteer2.modules.reinforce import ReinforceModule
from helpsteer2.rollouts.advantages import GAE, Advantages, AgainstBaseline
from helpsteer2.rollouts.maker import Report, RolloutMaker
from helpsteer2.rollouts.prompts import Prompts
from helpsteer2.rollouts.reference import ReferencePolicy
from helpsteer2.rollouts.scoring import RewardFunction
from helpsteer2.rollouts.settings import RolloutSettings
from helpsteer2.rollouts.store import Rollouts
from tests.training.runs import SHAPE, WORDS, Child, arguments

STOPS = tuple(range(200, 270))
"""Ids that end a response: the responses of a policy that knows nothing get all lengths from 1."""

SAMPLING = SamplingParams(n=4, max_tokens=8, stop_token_ids=STOPS)
WEIGHTS = AttributeWeights("toy", {"letters": 1.0, "length": -0.25})


@dataclass(frozen=True)
class ToyPrompts:
    """Prompts of 1 to 12 words."""

    n: int = 24
    seed: int = 0
    attribute_names: tuple[str, ...] = ()

    def read(self, split: str, report: Any) -> Iterator[Group]:
        raise AssertionError("nobody needs responses")

    def prompts(self, split: str, report: Any) -> Iterator[Group]:
        assert split == "train"
        rng = np.random.default_rng(self.seed)
        for i in range(self.n):
            words = " ".join(rng.choice(WORDS, rng.integers(1, 13)))
            yield Group(f"prompt-{i}", f"toy:{i}", ({"role": "user", "content": words},), ())

    def fingerprint(self, split: str) -> str:
        return f"{self.n} {self.seed}"


@dataclass
class ToyScorer:
    """Two scores that the text alone decides; notes what it scores.

    Args:
        calls: File that gets a line for every response, or None.
        nan_for: Id of a prompt whose responses get NaN, for as long as ``broken`` exists.
        broken: A file.
    """

    calls: Path | None = None
    nan_for: str | None = None
    broken: Path | None = None
    attribute_names: tuple[str, ...] = ("letters", "length")
    model_hash: str = "toy scorer"
    constant: bool = False

    def score(self, groups: Iterable[Group]) -> Iterator[npt.NDArray[np.float32]]:
        for group in groups:
            assert group.responses
            scores = [self._of(text) for text in group.responses]
            if self.calls is not None:
                with self.calls.open("a") as file:
                    file.writelines(f"{group.id} {i}\n" for i in range(len(scores)))
            if self.nan_for == group.id and self.broken is not None and self.broken.exists():
                scores[0] = (float("nan"), 0.0)
            yield np.array(scores, np.float32)

    def _of(self, text: str) -> tuple[float, float]:
        if self.constant:
            return 1.0, 0.0
        digest = hashlib.sha256(text.encode()).digest()
        return digest[0] / 64 - 2, len(text) / 4


def rollout_settings(**changes: Any) -> RolloutSettings:
    """8 prompts of 4 responses an iteration, in four blocks."""
    settings: dict[str, Any] = {
        "prompts": 8,
        "sampling": SAMPLING,
        "rewarder": ToyScorer,
        "engine": LocalEngine(prompts_per_block=2, device="cpu"),
        "epochs": 2,
        "unfinished": "keep",
    }
    return RolloutSettings(**settings | changes)


def module_of(kind: str, **changes: Any) -> partial[Any]:
    """What makes the module, with its usual settings."""
    settings: dict[str, Any] = {
        "kl": KLPenalty(0.05),
        "optimizer": partial(torch.optim.AdamW, lr=3e-3, fused=True),
    }
    if kind == "ppo":
        settings |= {
            "loss": ClippedLoss(),
            "value_loss": ValueLoss(),
            "advantages": GAE(),
            "critic": CriticStart(),
            "critic_lr": 1e-2,
        }
        return partial(PPOModule, **settings | changes)
    settings |= {"loss": PolicyGradientLoss(), "advantages": AgainstBaseline()}
    return partial(ReinforceModule, **settings | changes)


def lively_policy(folder: Path, seed: int) -> str:
    """A policy with large random weights, so that no two tokens are about as likely."""
    config = {**SHAPE, "initializer_range": 0.3}
    given = arguments(folder / "sft", module="sft", max_steps=1, validate_every=None, lr=1e-6,
                      optimized_metric=None, seed=seed)  # fmt: skip
    train(**given | {"backbone": Backbone(TrainedTokenizer(270), init="random", config=config)})
    return str(folder / "sft/export")


def lively_critic(policy: Policy) -> Critic:
    """A critic that expects something else at every token."""
    critic = CriticStart().build(policy, seed=0).eval()
    torch.manual_seed(4)
    torch.nn.init.normal_(critic.head.weight, std=0.3)
    return critic


@dataclass
class Learner:
    """What an iteration needs of a module."""

    model: Policy
    critic: Critic | None
    advantages: Advantages
    kl: KLPenalty

    def set_up(self, seed: int) -> None:
        pass

    def begin_iteration(self, rollouts: Rollouts) -> None:
        pass


def maker_of(
    folder: Path,
    policy: Policy,
    *,
    tokens: int = 120,
    data: ToyPrompts | None = None,
    **changes: Any,
) -> RolloutMaker:
    """What makes iterations of the toy prompts, its reference open."""
    settings = rollout_settings(**changes)
    prompts = list((data or ToyPrompts()).prompts("train", None))
    maker = RolloutMaker(
        folder,
        Prompts(prompts, settings.prompts, 1),
        settings,
        reward=RewardFunction.of(settings.rewarder(), WEIGHTS, settings.statistics),
        watched={k: RewardFunction.of(v(), WEIGHTS) for k, v in settings.watch.items()},
        tokens_per_pass=tokens,
        seed=1,
    )
    maker.reference = ReferencePolicy(policy, settings.reference, "cpu", "auto", settings.offload)
    return maker


def make(
    folder: Path,
    policy: str,
    advantages: Advantages,
    kl: KLPenalty | None = None,
    report: Report = lambda stage, done, total: None,
    **changes: Any,
) -> Rollouts:
    """The first iteration of a policy, with a lively critic if the advantages need one."""
    model, _, _ = Policy.from_pretrained(policy)
    critic = lively_critic(model) if advantages.needs_critic else None
    learner = Learner(model, critic, advantages, kl or KLPenalty(0.05))
    return maker_of(folder, model, **changes).make(0, learner, nullcontext, report)


@dataclass(frozen=True)
class Run:
    """An on-policy run: 3 iterations of 4 steps."""

    policy: str
    kind: str = "ppo"
    max_steps: int = 12
    global_batch: int = 4
    tokens: int = 120
    seed: int = 1
    devices: int = 1
    precision: str = "32-true"
    checkpoint_every: int = 1000
    lora: Any = None
    data: ToyPrompts = field(default_factory=ToyPrompts)
    module: dict[str, Any] = field(default_factory=dict)
    rollouts: dict[str, Any] = field(default_factory=dict)

    def arguments(self, run_dir: Path) -> dict[str, Any]:
        """Arguments of ``train``."""
        found = arguments(
            run_dir, max_steps=self.max_steps, tokens=self.tokens, seed=self.seed,
            devices=self.devices, precision=self.precision, lora=self.lora, policy=self.policy,
            validate_every=None, optimized_metric="rollout/reward",
        )  # fmt: skip
        decides = replace(self, devices=1, checkpoint_every=0, tokens=0, max_steps=0)
        return found | {
            "model": PolicyStart(),
            "data": self.data,
            "attributes": [],
            "batching": replace(found["batching"], global_batch=self.global_batch),
            "module": module_of(self.kind, **self.module),
            "rollouts": rollout_settings(**self.rollouts),
            "weights": WEIGHTS,
            "schedule": Cadence(None, self.checkpoint_every),
            "config": {
                "run_dir": str(run_dir),
                "batching": {"max_steps": self.max_steps},
                "rollouts": {"all": repr(decides)},
            },
        }

    def train(self, run_dir: Path) -> float | None:
        """Run it in this process."""
        return train(**self.arguments(run_dir))

    def start(self, run_dir: Path, *actions: Callable[[], None]) -> Child:
        """Run it in a process of its own, after some actions there."""
        return Child(run_child, run_dir.with_suffix(".out"), self, run_dir, *actions)


def run_child(run: Run, run_dir: Path, *actions: Callable[[], None]) -> int:
    """What the command line does with errors."""
    for action in actions:
        action()
    try:
        value = run.train(run_dir)
    except UserError as error:
        print(f"UserError: {error}")
        return error.exit_code
    print(f"value {value}", flush=True)
    return 0


def end(number: int = signal.SIGKILL) -> None:
    """Send a signal to this very process."""
    os.kill(os.getpid(), number)


def iteration(run_dir: Path, number: int = 0) -> Rollouts:
    """The rollouts of an iteration of a run."""
    return Rollouts(run_dir / "rollouts" / f"iteration_{number:06d}")


def metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """Metrics of every step."""
    found: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.csv").read_text().splitlines()[1:]:
        step, name, value = line.split(",")
        found.setdefault(int(step), {})[name] = float(value)
    return found
