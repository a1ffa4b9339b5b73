"""A policy as evaluators see it: prompts in, samples and log-probabilities out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from rich.console import Console

from helpsteer2.data.groups import Group
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.data.lengths import CutReport, LengthLimits
from helpsteer2.data.planner import consecutive_bins
from helpsteer2.data.tokenise import encode_group
from helpsteer2.errors import UserError
from helpsteer2.evaluation.scoring import group_progress
from helpsteer2.generation.sampling import with_labels

if TYPE_CHECKING:
    from helpsteer2.data.chat import BoundChat
    from helpsteer2.generation.sampling import Engine, Sample, Sampler, SamplingParams

TOKENS_PER_PASS = 8192
"""Tokens of one forward pass; a longer group gets a pass of its own."""


def label_read(
    asked: AttributeLabel | None, label_attributes: tuple[str, ...]
) -> AttributeLabel | None:
    """The label that a policy reads where something is asked for, or nothing is said.

    Args:
        asked: What is asked for; None for the usual values.
        label_attributes: What the labels of the policy's training were of; none if it had none.

    Returns:
        The label, with the usual values of what it leaves out; None for a policy without labels,
        which cannot be asked for anything.

    Raises:
        UserError: If something is asked for that the policy was not trained with, or the policy was
            trained with something that has no usual value and that is not asked for.
    """
    if not label_attributes:
        return None
    return (asked or AttributeLabel((), ())).completed(label_attributes)


@dataclass(frozen=True)
class EvaluatedPolicy:
    """A policy and the settings that it, and every policy beside it, is run with.

    Args:
        path: Folder or Hub id.
        engine: What samples from it.
        dtype: Type of the weights.
        attention: Attention backend.
    """

    path: str
    engine: Engine
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "sdpa", "flex", "flash"] = "auto"

    def beside(self, path: str) -> EvaluatedPolicy:
        """Another policy under the same settings."""
        return replace(self, path=path)

    @cached_property
    def sampler(self) -> Sampler:
        """The policy, ready to sample; loaded when it is first asked for."""
        return self.engine.open(self.path, self.dtype, self.attention)

    @property
    def chat(self) -> BoundChat:
        """The policy's chat format."""
        return self.sampler.chat

    @property
    def label_attributes(self) -> tuple[str, ...]:
        """What the labels of the policy's training were of; none if it had none, or if unknown."""
        return self.sampler.label_attributes or ()

    def sample(
        self,
        name: str,
        prompts: Sequence[Group],
        params: SamplingParams,
        console: Console,
        steering: AttributeLabel | None = None,
    ) -> list[list[Sample]]:
        """Sample n responses of each prompt behind its label; a progress bar tells how far it is.

        Args:
            name: Shown beside the bar.
            prompts: Groups of different ids; their responses are not looked at.
            params: How to draw.
            console: Where the bar is shown.
            steering: The label of all prompts; None leaves each its own.

        Returns:
            Samples of each prompt, in the order of the prompts.

        Raises:
            UserError: If the policy cannot be loaded or sampled, or if a prompt has a label and the
                policy was trained without any, or the other way round.
        """
        labelled = with_labels(prompts, steering, self.label_attributes)
        samples: dict[str, list[Sample]] = {}
        with group_progress(console) as progress:
            task = progress.add_task(name, total=len(prompts))
            for group, drawn in self.sampler.sample(labelled, params):
                samples[group.id] = drawn
                progress.advance(task)
        return [samples[group.id] for group in prompts]

    def logprobs(self, sampled: Sequence[Group]) -> Iterator[npt.NDArray[np.float32]]:
        """Log-probability of whole sampled responses, with their own ids.

        A policy that was trained with labels tells log Q(y|a, x), where a is ``label_read`` of the
        label of a group; one without tells log P(y|x), whatever the label of a group.

        Args:
            sampled: Groups with ``response_ids``.

        Yields:
            ``(n,)`` float32 nats of each group, in order.

        Raises:
            UserError: If the policy cannot be loaded, or the ids are not of its tokenizer and
                chat template.
        """
        import torch

        from helpsteer2.data.packing import pack
        from helpsteer2.models.policy import Policy

        device = "cuda" if torch.cuda.is_available() else "cpu"
        policy, _, chat = Policy.from_pretrained(self.path, self.dtype, self.attention, device)
        if any(group.tokenizer != chat.ids_hash for group in sampled):
            raise UserError(
                f"{self.path} has another tokenizer or chat template than the policy whose samples "
                "it shall judge: their log-probabilities cannot be compared"
            )
        attributes = policy.spec.label_attributes or ()
        read = [replace(group, label=label_read(group.label, attributes)) for group in sampled]
        # Nothing is cut: what the policy has sampled is judged whole.
        cuts, limits = CutReport(), LengthLimits(2**31, 2**31)
        encoded = [
            encode_group(group, i, chat, limits, (), (), cuts, close_cut=False)
            for i, group in enumerate(read)
        ]
        lengths = np.array([group.n_tokens for group in encoded])
        for members in consecutive_bins(lengths, TOKENS_PER_PASS):
            batch = pack([encoded[i] for i in members])
            with torch.inference_mode():
                tokens = policy.response_logprobs(batch.to(device))
                sums = tokens.sum_by_response(tokens.logprobs).cpu().numpy()
            yield from np.split(sums, np.cumsum(list(map(len, batch.layout.response_lengths)))[:-1])
