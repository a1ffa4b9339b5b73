"""Length limits: the only rules that cut a prompt or a response, with every cut counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from helpsteer2.data.chat import BoundChat
from helpsteer2.data.groups import Message
from helpsteer2.errors import UserError


@dataclass
class CutReport:
    """What length limits took away.

    Attributes:
        prompts_cut: Prompts that lost anything.
        turns_dropped: Turns (a user message with the answers to it) dropped whole, oldest first.
        responses_cut: Responses that lost their end.
        tokens_cut: Tokens that prompts and responses lost together.
    """

    prompts_cut: int = 0
    turns_dropped: int = 0
    responses_cut: int = 0
    tokens_cut: int = 0

    def counts(self) -> dict[str, int]:
        """The counters by name."""
        return asdict(self)


@dataclass(frozen=True)
class LengthLimits:
    """How long a prompt and a response may be.

    A prompt keeps its BOS, its system message and its last user turn: the oldest turns go first,
    and a last turn that is too long by itself keeps its end. A response loses the end of its
    content, in front of the closing tokens of the chat template or with them.

    Args:
        max_prompt_tokens: Longest prompt through the generation prompt, BOS included.
        max_response_tokens: Longest response, closing tokens included.

    Raises:
        UserError: If a limit is below 1.
    """

    max_prompt_tokens: int
    max_response_tokens: int

    def __post_init__(self) -> None:
        if min(self.max_prompt_tokens, self.max_response_tokens) < 1:
            raise UserError(
                "max_prompt_tokens and max_response_tokens must be at least 1, got "
                f"{self.max_prompt_tokens} and {self.max_response_tokens}"
            )

    def check(self, chat: BoundChat) -> None:
        """Refuse limits that the template's own tokens fill.

        Args:
            chat: Template and tokenizer.

        Raises:
            UserError: If not even a one-letter prompt or response fits.
        """
        prompt = len(chat.prompt_ids([{"role": "user", "content": "a"}]))
        if prompt > self.max_prompt_tokens:
            raise self._prompt_too_small(prompt)
        self._content_room(chat)

    def fit_messages(
        self, messages: Sequence[Message], ids: list[int], chat: BoundChat, report: CutReport
    ) -> Sequence[Message]:
        """Cut a prompt that is too long.

        Args:
            messages: The prompt, its last message from the user.
            ids: ``chat.prompt_ids(messages)``.
            chat: Template and tokenizer.
            report: Counts the cuts.

        Returns:
            Messages of at most ``max_prompt_tokens`` ids: those given if they fit.

        Raises:
            UserError: If the template and the system message alone are too long.
        """
        if len(ids) <= self.max_prompt_tokens:
            return messages
        system, turns = _turns(messages)
        kept = list(messages)
        n_tokens = len(ids)
        dropped = 0
        while n_tokens > self.max_prompt_tokens and dropped < len(turns) - 1:
            dropped += 1
            kept = [*system, *(m for turn in turns[dropped:] for m in turn)]
            n_tokens = len(chat.prompt_ids(kept))
        if n_tokens > self.max_prompt_tokens:
            kept, n_tokens = self._last_part([*system, *turns[-1]], chat)
        report.prompts_cut += 1
        report.turns_dropped += dropped
        report.tokens_cut += len(ids) - n_tokens
        return kept

    def fit_response(
        self, ids: list[int], chat: BoundChat, report: CutReport, close_cut: bool = True
    ) -> list[int]:
        """Cut the content of a response that is too long.

        Args:
            ids: Ids of the response, with its closing tokens.
            chat: Template and tokenizer.
            report: Counts the cuts.
            close_cut: Whether the closing tokens stand behind the cut, as a reward model needs, or
                are left out, so that a policy does not learn to stop there.

        Returns:
            At most ``max_response_tokens`` ids: those given if they fit.

        Raises:
            UserError: If the closing tokens alone are too long.
        """
        if len(ids) <= self.max_response_tokens:
            return ids
        content = ids[: len(ids) - chat.closing_count(ids)]
        if close_cut:
            kept = content[: self._content_room(chat)] + chat.closing_ids
        else:
            kept = content[: self.max_response_tokens]
        report.responses_cut += 1
        report.tokens_cut += len(ids) - len(kept)
        return kept

    def _last_part(self, messages: list[Message], chat: BoundChat) -> tuple[list[Message], int]:
        """Keep as many characters from the end of the last message as fit; also count the ids."""
        content = messages[-1]["content"]

        def with_content(text: str) -> list[Message]:
            return [*messages[:-1], {"role": "user", "content": text}]

        # By bisection: offsets of tokens cannot be trusted where a tokenizer drops characters.
        fitting, too_long = 0, len(content)
        n_tokens = 0
        while too_long - fitting > 1:
            middle = (fitting + too_long) // 2
            length = len(chat.prompt_ids(with_content(content[-middle:])))
            if length <= self.max_prompt_tokens:
                fitting, n_tokens = middle, length
            else:
                too_long = middle
        if not fitting:
            raise self._prompt_too_small(len(chat.prompt_ids(with_content("a"))))
        return with_content(content[-fitting:]), n_tokens

    def _content_room(self, chat: BoundChat) -> int:
        """Tokens left for the content of a response."""
        room = self.max_response_tokens - len(chat.closing_ids)
        if room < 1:
            raise UserError(
                f"max_response_tokens={self.max_response_tokens} leaves no room for a response: "
                f"template {chat.template_name!r} closes it with {len(chat.closing_ids)} tokens"
            )
        return room

    def _prompt_too_small(self, least: int) -> UserError:
        """The error for a prompt that no cut can fit."""
        return UserError(
            f"max_prompt_tokens={self.max_prompt_tokens} is too small: the chat template, the "
            f"system message and one token of the user's take {least} tokens"
        )


def _turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Leading system messages, then turns: each a user message with what answers it."""
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    turns: list[list[Message]] = []
    for message in messages[first:]:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return list(messages[:first]), turns
