"""What all contenders score and train on: real prompts, ten real responses to each."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.benchmarks.dpo_step.job import DPOJob
from experiments.benchmarks.reward_step.cost import Size
from experiments.benchmarks.reward_step.job import FINGERPRINT, SEED, Corpus
from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, RATING_MAX
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import read_all
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.data.lengths import CutReport, LengthLimits
from helpsteer2.data.sources.chat_files import ChatFiles
from helpsteer2.data.token_store import TokenisedGroups, TokenWriter, open_store
from helpsteer2.data.tokenise import encode_group
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.models.reference import reference_split

RESPONSES = 10
"""To every prompt, as in the paper."""

TARGET_SPREAD = 1.0
"""Standard deviation, in nats, of log w'."""

POLICY_SPREAD = 0.5
"""Standard deviation, in nats, of log b' before the first step: b' is not uniform."""

POSITIONS = 2048
"""Of the model: prompt, label and response together may pass the 1,024 of the other benchmarks."""

LONGEST_PROMPT = 1024
"""Of conversations: with a label and the longest response it fits into the positions."""

PLAIN, LABELLED = "plain", "labelled"
REF_LOGPROBS = "ref_logprobs.npy"


@dataclass(frozen=True)
class SteerLM2Job(DPOJob):
    """One measurement. Its folder holds the groups twice, without labels and with them."""

    def config(self) -> dict[str, Any]:
        """The transformers config."""
        return {**super().config(), "max_position_embeddings": POSITIONS}

    @property
    def responses_per_step(self) -> int:
        """Responses that a turn scores, or trains on."""
        return self.size.groups_per_step * RESPONSES

    def groups(self) -> TokenisedGroups:
        """Groups with labels, targets (``rewards``) and log-probabilities of the proposal."""
        sums = np.load(self.folder / REF_LOGPROBS)
        return _opened(self.folder / LABELLED).with_ref_logprobs(sums)

    def plain_groups(self) -> TokenisedGroups:
        """The same groups without labels."""
        return _opened(self.folder / PLAIN)

    def steps(self) -> npt.NDArray[np.int64]:
        """``(steps, groups_per_step)`` the groups of every step, those of the warm-up first."""
        return self.order().reshape(self.total_steps, -1)


def make_job(
    corpus: Corpus,
    folder: Path,
    *,
    size: Size,
    warmup_steps: int,
    measured_steps: int,
    tokens_per_microbatch: int,
    conversations: str | None = None,
) -> SteerLM2Job:
    """Draw the groups and write them where every contender reads them.

    The proposal is the policy before its first step but for some noise, and targets are such that
    the weights w' of ten responses are neither even nor one response's alone: what they are does
    not matter for speed.

    Args:
        corpus: Where to draw from; a prompt occurs once.
        folder: To create.
        size: The model, and prompts a step.
        warmup_steps: Steps before the measured ones.
        measured_steps: Measured steps.
        tokens_per_microbatch: Tokens of a packed row.
        conversations: File of conversations whose prompts are taken in place of the corpus's own.
    """
    job = SteerLM2Job(
        size, "fp32", folder, corpus.tokenizer, corpus.spec,
        warmup_steps, measured_steps, tokens_per_microbatch,
    )  # fmt: skip
    wanted = job.total_steps * size.groups_per_step
    prompts = prompts_of(corpus, conversations)
    if wanted > len(prompts):
        raise SystemExit(
            f"{job.total_steps} steps need {wanted} prompts, there are {len(prompts)}: "
            "lower --rounds or --prompts"
        )
    folder.mkdir()
    plain, labelled = draw(corpus, prompts, wanted)
    _write(folder / PLAIN, plain)
    with tempfile.TemporaryDirectory() as aside:
        policy = job.policy().eval()
        without_targets = _write(Path(aside) / "groups", labelled)
        own = reference_split(policy, without_targets, tokens_per_microbatch).sums()
    noise = np.random.default_rng(SEED).normal(size=(2, len(own)))
    proposal = own + POLICY_SPREAD * noise[0]
    targets = np.split(proposal + TARGET_SPREAD * noise[1], wanted)
    np.save(folder / REF_LOGPROBS, proposal.astype(np.float32))
    known = (
        replace(group, rewards=of_group.astype(np.float32))
        for group, of_group in zip(labelled, targets, strict=True)
    )
    _write(folder / LABELLED, known)
    return job


def prompts_of(corpus: Corpus, conversations: str | None = None) -> list[npt.NDArray[np.int32]]:
    """Ids of all prompts there are."""
    if conversations is None:
        return [corpus.groups[i].prompt_ids for i in range(len(corpus.groups))]
    chat, limits = ChatFormat().bind(corpus.tokenizer), LengthLimits(LONGEST_PROMPT, POSITIONS)
    encoded = (
        encode_group(group, i, chat, limits, (), (), CutReport(), close_cut=False)
        for i, group in enumerate(read_all(ChatFiles(conversations), "train"))
    )
    return [group.prompt_ids for group in encoded]


def draw(
    corpus: Corpus, prompts: Sequence[npt.NDArray[np.int32]], wanted: int
) -> tuple[list[TokenGroup], list[TokenGroup]]:
    """Prompts as they are, each with ten different responses out of the whole corpus.

    Args:
        corpus: Where responses are drawn from.
        prompts: Ids of the prompts to draw from.
        wanted: Number of prompts.

    Returns:
        The groups without labels, and the same with a label of five ratings behind each prompt.
    """
    rng = np.random.default_rng(SEED)
    chat = ChatFormat().bind(corpus.tokenizer)
    owners = np.repeat(np.arange(len(corpus.groups)), corpus.groups.n_responses)
    within = np.concatenate([np.arange(n) for n in corpus.groups.n_responses])
    plain, labelled = [], []
    for index, source in enumerate(rng.permutation(len(prompts))[:wanted]):
        responses = tuple(
            corpus.groups[int(owners[chosen])].response_ids[int(within[chosen])]
            for chosen in rng.choice(len(owners), RESPONSES, replace=False)
        )
        ratings = np.full((RESPONSES, len(HELPSTEER2_ATTRIBUTES)), np.nan, np.float32)
        prompt = prompts[int(source)]
        plain.append(TokenGroup(prompt, responses, ratings, np.nan, index))
        levels = rng.integers(0, int(RATING_MAX), endpoint=True, size=len(HELPSTEER2_ATTRIBUTES))
        label = AttributeLabel.of(dict(zip(HELPSTEER2_ATTRIBUTES, levels.tolist(), strict=True)))
        of_label = np.array(chat.labels.ids(label), dtype=np.int32)
        labelled.append(replace(plain[-1], prompt_ids=np.concatenate([prompt, of_label])))
    return plain, labelled


def lengths_of(groups: TokenisedGroups) -> dict[str, Any]:
    """Mean and quantiles of the tokens of prompts and responses, for the record."""
    responses = groups.response_lengths
    prompts = groups.lengths - responses.reshape(len(groups), -1).sum(axis=1)
    return {
        name: {
            "mean": float(values.mean()),
            **{f"q{q}": float(np.percentile(values, q)) for q in (10, 50, 90)},
        }
        for name, values in (("prompt", prompts), ("response", responses))
    }


def _write(folder: Path, groups: Iterator[TokenGroup] | Sequence[TokenGroup]) -> TokenisedGroups:
    with TokenWriter(folder, HELPSTEER2_ATTRIBUTES) as writer:
        for group in groups:
            writer.add(group, str(group.index))
        writer.finish(FINGERPRINT, {})
    return _opened(folder)


def _opened(folder: Path) -> TokenisedGroups:
    groups = open_store(folder, FINGERPRINT)
    if groups is None:
        raise RuntimeError(f"no groups in {folder}")
    return groups
