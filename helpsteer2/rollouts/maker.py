"""Making an iteration of rollouts: samples, scores, log-probabilities, block by block on the disk.

A block is a run of prompts that are sampled together. Each stage writes one file a block, whole or
not at all, and leaves out those that are there: so an iteration that was killed goes on where it
was, to the same bytes, and memory does not grow with the number of rollouts. Ranks share blocks.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from helpsteer2.data.group_encoder import GroupEncoder
from helpsteer2.data.groups import Group, read_all
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.packing import PackedBatch, pack
from helpsteer2.data.planner import consecutive_bins
from helpsteer2.data.sources.group_files import GroupFiles, write_groups
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.errors import UserError
from helpsteer2.functional.autocast import cached_casts
from helpsteer2.functional.sampling import stream_key
from helpsteer2.generation.local import LocalSampler
from helpsteer2.generation.sampling import sampled_group
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.models.critic import Critic
from helpsteer2.models.policy import Policy
from helpsteer2.records import write_atomic
from helpsteer2.rollouts.advantages import Advantages
from helpsteer2.rollouts.assemble import Block, assemble
from helpsteer2.rollouts.prompts import Prompts
from helpsteer2.rollouts.reference import ReferencePolicy, on_device
from helpsteer2.rollouts.scoring import RewardFunction
from helpsteer2.rollouts.settings import RolloutSettings
from helpsteer2.rollouts.store import Rollouts, read_record

Report = Callable[[str, int, int], None]
"""Told the stage, how many of its responses are done, and how many there are."""

NOT_CUT = LengthLimits(2**31, 2**31)
"""What was sampled is learned whole."""

SAMPLES, SCORES, WATCHED, LOGPROBS, REFERENCE = (
    "samples", "scores", "watched", "logprobs", "reference",
)  # fmt: skip


class Learner(Protocol):
    """What trains, as rollouts see it."""

    model: Policy
    critic: Critic | None
    advantages: Advantages
    kl: KLPenalty

    def set_up(self, seed: int) -> None:
        """Make what trains beside the policy."""
        ...

    def begin_iteration(self, rollouts: Rollouts) -> None:
        """Learn from these rollouts from here on."""
        ...


@dataclass(frozen=True)
class Ranks:
    """The processes that make rollouts together.

    Attributes:
        rank: This one.
        world_size: How many.
        barrier: Waits for all.
        broadcast: Tells all what the first one knows.
    """

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], object] = lambda: None
    broadcast: Callable[[bool], bool] = lambda value: value


class RolloutMaker:
    """Makes iterations from the weights that a learner has at the time.

    Args:
        folder: Holds one folder an iteration.
        prompts: What is answered.
        settings: How.
        reward: What scores the responses.
        watched: Other scorers, by name.
        tokens_per_pass: Tokens of one forward pass for log-probabilities and values.
        seed: Seed of the samples.

    Attributes:
        reference: What KL divergences are measured from; set before the first iteration is made.
        ranks: Who shares the work.
    """

    reference: ReferencePolicy

    def __init__(
        self,
        folder: Path,
        prompts: Prompts,
        settings: RolloutSettings,
        *,
        reward: RewardFunction,
        watched: dict[str, RewardFunction],
        tokens_per_pass: int,
        seed: int,
    ) -> None:
        self.folder = folder
        self.prompts = prompts
        self.settings = settings
        self.reward = reward
        self.watched = watched
        self.tokens_per_pass = tokens_per_pass
        self.seed = seed
        self.ranks = Ranks()

    def folder_of(self, iteration: int) -> Path:
        """Where an iteration is."""
        return self.folder / f"iteration_{iteration:06d}"

    def make(
        self,
        iteration: int,
        learner: Learner,
        autocast: Callable[[], AbstractContextManager[object]],
        report: Report = lambda stage, done, total: None,
    ) -> Rollouts:
        """The rollouts of an iteration: those on the disk, or new ones from the learner's weights.

        Args:
            iteration: 0-based. All before it have to be there.
            learner: Has the weights of this iteration's start, unless it is on the disk.
            autocast: Makes the context that training computes in.
            report: Told how far it is.

        Raises:
            UserError: If a reward is not finite, a server stays away, or the disk is full. The same
                call goes on from there.
        """
        folder = self.folder_of(iteration)
        if iteration:
            read_record(self.folder_of(iteration - 1))  # is wanted when all else is made
        if not self.ranks.broadcast(Rollouts.is_whole(folder)):
            work = _Iteration(self, iteration, learner, report)
            with _evaluating(learner), torch.no_grad(), autocast():
                work.run()
            self.ranks.barrier()
            if self.ranks.rank == 0:
                work.assemble()
            self.ranks.barrier()
        if self.ranks.rank == 0:
            _remove_blocks(folder)
        return Rollouts(folder)


class _Iteration:
    """One iteration in the making.

    Args:
        maker: What it is made with.
        number: 0-based.
        learner: Whose weights.
        report: Told how far it is.
    """

    def __init__(self, maker: RolloutMaker, number: int, learner: Learner, report: Report) -> None:
        self.maker, self.number, self.learner, self.report = maker, number, learner, report
        self.folder = maker.folder_of(number)
        self.k = maker.settings.sampling.n
        prompts = maker.prompts.of_iteration(number)
        each = -(-len(prompts) // maker.ranks.world_size)
        size = min(maker.settings.engine.prompts_per_block, each)
        self.firsts = range(0, len(prompts), size)
        self.blocks = [prompts[first : first + size] for first in self.firsts]
        self.seconds: dict[str, float] = {}
        self.device = learner.model.lm_head.weight.device
        self._encoder = GroupEncoder(learner.model.spec.chat, NOT_CUT, (), for_policy=True)
        # Several things are made of a block one after the other; one at a time is held.
        self.groups = lru_cache(maxsize=1)(self._read)
        self.tokens = lru_cache(maxsize=1)(self._encode)

    def run(self) -> None:
        """Every stage, on this rank's blocks."""
        maker, settings = self.maker, self.maker.settings
        # Made anew: it keeps the head's weights as they are now.
        sampler = LocalSampler(self.learner.model, settings.engine)
        seed = stream_key(maker.seed, "rollouts", self.number) >> 1
        params = replace(settings.sampling, seed=seed)
        with self._timed("sampling"), cached_casts(self.device.type):
            for number, path in self._missing(SAMPLES, ".jsonl"):
                samples = dict(
                    (group.id, sampled_group(group, drawn, sampler.ids_hash))
                    for group, drawn in sampler.sample(self.blocks[number], params)
                )
                write_groups(path, (samples[group.id] for group in self.blocks[number]), ())
        with self._timed("scoring"):
            self._score_stage(SCORES, maker.reward)
        for name, watcher in maker.watched.items():
            with self._timed("watching"):
                self._score_stage(f"{WATCHED}_{name}", watcher)
        with self._timed("log-probs"):
            with cached_casts(self.device.type):
                self._array_stage(LOGPROBS, self._own_columns)
            with maker.reference.ready(self.learner.model) as reference:
                self._array_stage(
                    REFERENCE,
                    lambda number: self._columns(
                        number, lambda batch: [reference.response_logprobs(batch).logprobs]
                    ),
                )

    def assemble(self) -> None:
        """Rewards, advantages, figures and the final files."""
        before = None
        if self.number:
            before = read_record(self.maker.folder_of(self.number - 1))
        assemble(
            self.folder,
            [self._block(number) for number in range(len(self.blocks))],
            reward=self.maker.reward,
            watched=self.maker.watched,
            settings=self.maker.settings,
            advantages=self.learner.advantages,
            kl=self.learner.kl,
            before=before,
            seconds=self.seconds,
        )

    def _read(self, number: int) -> list[Group]:
        """The samples of a block."""
        return list(read_all(GroupFiles(str(self._path(SAMPLES, number, ".jsonl"))), "train"))

    def _encode(self, number: int) -> list[TokenGroup]:
        """The same as ids."""
        encoded = []
        for group in self._encoder.encode(self.groups(number), self.firsts[number]):
            if isinstance(group, UserError):
                raise group
            encoded.append(group)
        return encoded

    def _block(self, number: int) -> Block:
        """What the stages have left of a block, read when it is asked for."""

        def read(stage: str) -> npt.NDArray[np.float32]:
            array: npt.NDArray[np.float32] = np.load(self._path(stage, number, ".npy"))
            return array

        return Block(
            n_prompts=len(self.blocks[number]),
            groups=lambda: self.groups(number),
            tokens=lambda: self.tokens(number),
            scores=lambda: read(SCORES),
            watched=lambda name: read(f"{WATCHED}_{name}"),
            logprobs=lambda: read(LOGPROBS),
            ref_logprobs=lambda: read(REFERENCE)[0],
        )

    def _path(self, stage: str, number: int, suffix: str) -> Path:
        # By its prompts: another number of ranks makes other blocks.
        first = self.firsts[number]
        last = first + len(self.blocks[number]) - 1
        return self.folder / stage / f"prompts_{first:06d}_{last:06d}{suffix}"

    def _missing(self, stage: str, suffix: str) -> Iterator[tuple[int, Path]]:
        """This rank's blocks that a stage has not done yet; tells of every block that is done."""
        ranks = self.maker.ranks
        total = self.k * sum(map(len, self.blocks))
        done = 0
        for number, block in enumerate(self.blocks):
            path = self._path(stage, number, suffix)
            if number % ranks.world_size == ranks.rank and not path.exists():
                yield number, path
            done += self.k * len(block)
            self.report(stage, done, total)

    def _score_stage(self, stage: str, scorer: RewardFunction) -> None:
        model = getattr(scorer.rewarder, "model", None)  # a server's is elsewhere
        device, offload = self.device, self.maker.settings.offload
        # A reward model has a dtype of its own, the same as behind a server.
        with on_device(model, device, offload), torch.autocast(device.type, enabled=False):
            self._array_stage(stage, lambda number: scorer.scores(self.groups(number)))

    def _array_stage(self, stage: str, make: Callable[[int], npt.NDArray[np.float32]]) -> None:
        for number, path in self._missing(stage, ".npy"):
            array = make(number)
            write_atomic(path, lambda file, array=array: np.save(file, array))  # type: ignore[misc]

    def _own_columns(self, number: int) -> npt.NDArray[np.float32]:
        """``(1, N)`` log-probabilities as training computes them, ``(2, N)`` with values."""
        policy, critic = self.learner.model, self.learner.critic

        def columns(batch: PackedBatch) -> list[Tensor]:
            own = [policy.response_logprobs(batch).logprobs]
            return own if critic is None else [*own, critic(batch)]

        return self._columns(number, columns)

    def _columns(
        self, number: int, columns: Callable[[PackedBatch], Sequence[Tensor]]
    ) -> npt.NDArray[np.float32]:
        """``(C, N)`` columns of the tokens of a block, some passes one after the other."""
        groups = self.tokens(number)
        parts = []
        lengths = [group.n_tokens for group in groups]
        for members in consecutive_bins(lengths, self.maker.tokens_per_pass):
            batch = pack([groups[i] for i in members]).to(self.device)
            parts.append(torch.stack(list(columns(batch))).float().cpu().numpy())
        found = np.concatenate(parts, axis=1)
        if not np.isfinite(found).all():
            raise UserError(
                "a log-probability or value of the rollouts is not finite: the weights are broken; "
                "start again with a lower learning rate"
            )
        return found

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _remove_blocks(folder: Path) -> None:
    """Remove what a whole iteration was made from, also if a kill has left it."""
    for stage in {path.parent for path in folder.glob("*/prompts_*")}:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _evaluating(learner: Learner) -> Iterator[None]:
    """Without dropout, and with no other trace in the models that train."""
    models: list[nn.Module] = [learner.model, *([learner.critic] if learner.critic else [])]
    were_training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, training in zip(models, were_training, strict=True):
            model.train(training)
