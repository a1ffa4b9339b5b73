"""What every sampling engine takes and gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from helpsteer2.data.groups import FinishReason, Group
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.errors import UserError

if TYPE_CHECKING:
    from helpsteer2.data.chat import BoundChat

SOURCE = "sampled"
"""``Group.source`` of what was sampled."""


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn.

    Top-k comes before top-p, both after the temperature, as in transformers and vLLM.

    Args:
        n: Responses of a prompt.
        temperature: Divides the logits; 0 always takes the likeliest token (greedy).
        top_p: Only the likeliest tokens whose probabilities sum up to this are drawn; 1 for all.
        top_k: Only so many of the likeliest tokens are drawn; 0 for all.
        max_tokens: Longest response, in tokens, its end-of-turn token included.
        stop_token_ids: Tokens that end a response beside the end-of-turn tokens of the chat.
        seed: Seed of the random numbers.

    Raises:
        UserError: If a value is out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "n": (self.n >= 1, "1 or more"),
            "temperature": (0 <= self.temperature <= 100, "0 (greedy) to 100"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1 (all tokens)"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "stop_token_ids": (all(t >= 0 for t in self.stop_token_ids), "token ids"),
            "seed": (0 <= self.seed < 2**63, "0 to 2^63 − 1"),
        }
        wrong = [
            f"{name} is {getattr(self, name)!r}, must be {what}"
            for name, (right, what) in rules.items()
            if not right
        ]
        if wrong:
            raise UserError(f"sampling: {'; '.join(wrong)}")
        if self.temperature == 0 and self.n > 1:
            raise UserError(
                f"sampling: temperature 0 gives n={self.n} times the same response: set n=1"
            )


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    Attributes:
        ids: Token ids as sampled; they end with a stop token if the model stopped, and with
            whatever came last if ``max_tokens`` cut it.
        text: The ids without the stop token, decoded.
        finish_reason: ``stop`` or ``length``.
        logprobs: Nats, one a token of ``ids``, under the model's own distribution at temperature
            1 and without truncation; None if the engine does not tell.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None


class Sampler(Protocol):
    """A model that samples responses."""

    @property
    def chat(self) -> BoundChat:
        """Chat template and tokenizer of the model."""
        ...

    @property
    def ids_hash(self) -> str:
        """Tokenizer and chat template that the ids of its samples belong to."""
        ...

    @property
    def label_attributes(self) -> tuple[str, ...] | None:
        """What the labels of the model's training were of; none if it had none, None if unknown."""
        ...

    @property
    def prompts_per_block(self) -> int:
        """Prompts that go together, in their order: the same ones give the same bits again.

        What runs beside a prompt changes the rounding of its log-probs where it is computed in one
        matrix product with it. 1 if each prompt stands alone.
        """
        ...

    def sample(
        self, prompts: Iterable[Group], params: SamplingParams
    ) -> Iterator[tuple[Group, list[Sample]]]:
        """Sample n responses of each prompt, behind its label if it has one.

        The random numbers of a sample depend on the seed, the group's id, the sample's index and
        the position of its token alone, so what runs beside it changes nothing.

        Args:
            prompts: Groups; their responses are not looked at.
            params: How to draw.

        Yields:
            Each group with its n samples, in the order in which they are done.
        """
        ...


class Engine(Protocol):
    """What samples, as configured: ``engine`` of ``helpsteer2 sample``."""

    @property
    def identity(self) -> dict[str, str | int | None]:
        """What of it the samples depend on, beyond speed: two halves of a run have to agree."""
        ...

    def open(
        self,
        model: str,
        dtype: Literal["float32", "bfloat16"],
        attention: Literal["auto", "sdpa", "flex", "flash"],
    ) -> Sampler:
        """Load the model, or find out that its server can be used.

        Args:
            model: Folder or Hub id of the policy; of a served one, that of its tokenizer and chat
                template at the least.
            dtype: Type of the weights of a model that is loaded here.
            attention: Attention backend of a model that is loaded here.

        Raises:
            UserError: If it cannot be used.
        """
        ...


def response_text(chat: BoundChat, ids: Sequence[int], finish_reason: FinishReason) -> str:
    """Text of a sampled response.

    Args:
        chat: Chat template and tokenizer of the model.
        ids: As sampled.
        finish_reason: After ``stop`` the last id is a stop token, which is no text.

    Returns:
        The text, without control tokens.
    """
    content = list(ids[:-1] if finish_reason == "stop" else ids)
    return str(chat.tokenizer.decode(content, skip_special_tokens=True))


def sampled_group(group: Group, samples: Sequence[Sample], ids_hash: str) -> Group:
    """The prompt with its samples; ratings of the responses it had before do not stay.

    Args:
        group: The prompt.
        samples: Its n responses.
        ids_hash: Tokenizer and chat template that their ids belong to.
    """
    # The label is part of what the samples were drawn behind.
    known = [one.logprobs for one in samples if one.logprobs is not None]
    return Group(
        id=group.id,
        source=SOURCE,
        prompt=group.prompt,
        responses=tuple(one.text for one in samples),
        response_ids=tuple(one.ids for one in samples),
        tokenizer=ids_hash,
        finish_reasons=tuple(one.finish_reason for one in samples),
        logprobs=tuple(known) if len(known) == len(samples) else None,
        label=group.label,
    )


def with_labels(
    prompts: Sequence[Group], steering: AttributeLabel | None, attributes: Sequence[str] | None
) -> list[Group]:
    """Prompts with the labels that a policy answers behind.

    Args:
        prompts: The prompts; a label of their own gives way to ``steering``.
        steering: The label of all of them; None leaves each its own.
        attributes: What the labels of the policy's training were of; none if it had none. None if
            nobody knows: labels are then taken as they are.

    Returns:
        The prompts. A label that leaves out attributes which the policy knows has the usual values
        for them (``INFERENCE_VALUES``).

    Raises:
        UserError: If a prompt has no label and the policy needs one, if it has one and the policy
            was trained without, or if it names attributes that the policy does not know.
    """
    labelled = []
    for group in prompts:
        label = steering or group.label
        if attributes is None:
            labelled.append(replace(group, label=label))
            continue
        if label is None and attributes:
            raise UserError(
                f"{group.source}: the policy was trained to answer behind a label of "
                f"{', '.join(attributes)}, and there is none: set steering="
                "'{helpfulness: 4, verbosity: 2}', or give the prompts labels (helpsteer2 label)"
            )
        if label is not None and not attributes:
            raise UserError(
                f"{group.source}: the policy was trained without labels and cannot be asked for "
                f"{label.text}: leave the label out, or train it on labelled groups (SteerLM)"
            )
        label = None if label is None else label.completed(attributes)
        labelled.append(replace(group, label=label))
    return labelled
