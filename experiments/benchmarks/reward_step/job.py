"""What all contenders train on: the same groups, the same weights, the same number a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from experiments.benchmarks.reward_step.cost import VOCABULARY, Size
from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import GroupSource, read_all
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.planner import StepPlan
from helpsteer2.data.token_store import TokenisedGroups, TokenWriter, open_store
from helpsteer2.data.tokenise import tokenise
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.spec import RewardSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Dtype = Literal["fp32", "bf16"]

LIMITS = LengthLimits(max_prompt_tokens=512, max_response_tokens=512)
"""Prompt and response together stay within the 1,024 tokens above which TRL drops a row."""

SEED = 1
LEARNING_RATE = 1e-4
FINGERPRINT = "benchmark"
MEGABATCH_STEPS = 50
"""Steps that transformers' LengthGroupedSampler sorts at a time in a large data set."""


@dataclass(frozen=True)
class Corpus:
    """All groups of the source, tokenised.

    Attributes:
        description: Where they come from, without a path of the user.
        groups: The groups.
        tokenizer: Trained on them.
        spec: What the reward model remembers.
    """

    description: str
    groups: TokenisedGroups
    tokenizer: PreTrainedTokenizerFast
    spec: RewardSpec


@dataclass(frozen=True)
class Job:
    """One measurement: a model size and a precision. Pickles, to be sent to the contenders.

    Attributes:
        size: The model.
        dtype: fp32, or bf16 autocast over fp32 weights.
        folder: Holds the groups of this job alone.
        tokenizer: Of the groups.
        spec: What the reward model remembers.
        warmup_steps: Steps before the measured ones.
        measured_steps: Measured steps.
        tokens_per_microbatch: Tokens of a packed row.
    """

    size: Size
    dtype: Dtype
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    spec: RewardSpec
    warmup_steps: int
    measured_steps: int
    tokens_per_microbatch: int

    @property
    def total_steps(self) -> int:
        """Steps with warm-up."""
        return self.warmup_steps + self.measured_steps

    def backbone(self) -> Backbone:
        """The backbone as ``helpsteer2 train`` configures it."""
        return Backbone(TrainedTokenizer(VOCABULARY), init="random", config=self.config())

    def config(self) -> dict[str, Any]:
        """The transformers config."""
        return self.size.config()

    def groups(self) -> TokenisedGroups:
        """The groups of this job."""
        groups = open_store(self.folder, FINGERPRINT)
        if groups is None:
            raise RuntimeError(f"no groups in {self.folder}")
        return groups

    def order(self) -> npt.NDArray[np.int64]:
        """Groups in the order in which the planner trains on them."""
        plan = StepPlan(
            self.groups().lengths,
            global_batch=self.size.groups_per_step,
            tokens_per_microbatch=self.tokens_per_microbatch,
            total_steps=self.total_steps,
            seed=SEED,
        )
        return np.concatenate([plan.groups(step) for step in range(self.total_steps)])

    def grouped_order(self) -> npt.NDArray[np.int64]:
        """The measured groups as transformers groups them by length, the warm-up's likewise.

        The sampler sorts 50 steps at a time in a large data set, so all measured groups up to that
        number are sorted together: the padding is that of a large data set. Whole steps are then
        put in a random order, which changes no batch and keeps a drift of the machine apart from
        the length.
        """
        from transformers.trainer_pt_utils import get_length_grouped_indices

        order, batch = self.order(), self.size.groups_per_step
        longest = np.array([max(row_lengths(group)) for group in self.groups()])
        parts = []
        for part in np.split(order, [self.warmup_steps * batch]):
            indices = get_length_grouped_indices(longest[part].tolist(), batch, MEGABATCH_STEPS)
            steps = part[indices].reshape(-1, batch)
            parts.append(np.random.default_rng(SEED).permutation(steps).reshape(-1))
        return np.concatenate(parts)


def row_lengths(group: Any) -> list[int]:
    """Tokens of prompt and response, for each response of a group."""
    return [len(group.prompt_ids) + len(ids) for ids in group.response_ids]


def load_corpus(real_data: str | None, cache_dir: Path) -> Corpus:
    """Tokenise the real slice, or the embedded world where there is none.

    Args:
        real_data: Folder that holds ``helpsteer2_slice``, or None.
        cache_dir: Folder for the tokenizer and the tokenised groups.
    """
    source, description = _source(real_data)

    def texts() -> Iterator[str]:
        for group in read_all(source, "train"):
            yield from (message["content"] for message in group.prompt)
            yield from group.responses

    tokenizer = TrainedTokenizer(VOCABULARY).build(texts, cache_dir)
    chat = ChatFormat().bind(tokenizer)
    groups = tokenise(source, "train", chat, LIMITS, HELPSTEER2_ATTRIBUTES, cache_dir)
    spec = RewardSpec.of(HELPSTEER2_ATTRIBUTES, chat, tokenizer, LIMITS, "random llama")
    return Corpus(description, groups, tokenizer, spec)


def _source(real_data: str | None) -> tuple[GroupSource, str]:
    from helpsteer2.data.sources.helpsteer import HelpSteer2
    from helpsteer2.world.source import WorldSource

    if real_data is None:
        return WorldSource(groups=1024, validation_groups=1, seed=0), "embedded world"
    return HelpSteer2(path=str(Path(real_data) / "helpsteer2_slice")), "real HelpSteer2 slice"


def make_job(
    corpus: Corpus,
    folder: Path,
    *,
    size: Size,
    dtype: Dtype,
    warmup_steps: int,
    measured_steps: int,
    tokens_per_microbatch: int,
) -> Job:
    """Draw the groups of a job and write them where every contender reads them.

    Args:
        corpus: Where to draw from, without replacement.
        folder: To create.
        size: The model.
        dtype: Precision.
        warmup_steps: Steps before the measured ones.
        measured_steps: Measured steps.
        tokens_per_microbatch: Tokens of a packed row.
    """
    wanted = (warmup_steps + measured_steps) * size.groups_per_step
    if wanted > len(corpus.groups):
        raise SystemExit(
            f"{measured_steps} rounds need {wanted} groups, there are {len(corpus.groups)}: "
            "lower --rounds"
        )
    drawn = np.random.default_rng(SEED).permutation(len(corpus.groups))[:wanted]
    with TokenWriter(folder, corpus.groups.attribute_names) as writer:
        for index in drawn:
            group = corpus.groups[int(index)]
            if len(group.response_ids) != 2:
                raise SystemExit("TRL trains on pairs, and a group here is none")
            writer.add(group, corpus.groups.ids[int(index)])
        writer.finish(FINGERPRINT, {})
    return Job(
        size, dtype, folder, corpus.tokenizer, corpus.spec,
        warmup_steps, measured_steps, tokens_per_microbatch,
    )  # fmt: skip
