"""Chat templates: the one place where text becomes token ids.

The definition that training, scoring and sampling share:

* the prompt's text is ``render(messages, add_generation_prompt=True)``;
* a response's text is ``render(messages + [answer])`` without the prompt's text in front;
* the two are tokenised apart, and the prompt starts with exactly one BOS if the model has one;
* an attribute label stands between them, tokenised apart too: with it and without it, the ids of
  prompt and response are the same.

Where a template ends the prompt with a special token this gives the ids of the whole conversation;
elsewhere a token may span the boundary, and ``boundary_difference`` says how often it does.

Control tokens inside messages (a user who types ``<|eot_id|>``) are encoded as ordinary text: only
the template writes control tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt

from helpsteer2.data.groups import Message
from helpsteer2.data.label_encoder import LabelEncoder
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.data.templates import SHIPPED, find_template, freeze_date
from helpsteer2.data.text_encoder import TextEncoder, tokenizer_parts
from helpsteer2.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "a7f3c1e9"


@dataclass(frozen=True)
class ChatFormat:
    """Which chat template writes prompts and responses.

    Args:
        template: ``auto`` (the tokenizer's own template, else ``plain``), ``backbone`` (the
            tokenizer's own), ``plain`` (role names on lines of their own, EOS after each answer),
            ``extra_id`` (NeMo-Aligner's reward-model text; the reward is read at ``<extra_id_2>``),
            or the path of a ``.jinja`` file.
        system_prompt: System message of every conversation that has none of its own. NeMo-Aligner
            gives all reward-model data the same one; nothing is added unless it is set here.
        label_form: How an attribute label is written behind the generation prompt, ``{label}``
            standing for it; None as the template has it: ``<extra_id_2>{label}`` and a newline in
            ``extra_id``, the label and a newline in all others.

    Raises:
        UserError: If the template is neither a known name nor a ``.jinja`` path, or the form has no
            ``{label}``.

    Source: NVIDIA/NeMo-Aligner examples/nlp/data/steerlm/common.py (``extra_id``).
    """

    template: str = "auto"
    system_prompt: str | None = None
    label_form: str | None = None

    def __post_init__(self) -> None:
        if self.label_form is not None and self.label_form.count("{label}") != 1:
            raise UserError(
                f"chat.label_form={self.label_form!r} has to hold {{label}} once, where the "
                "attribute label stands"
            )
        known = ("auto", "backbone", *SHIPPED)
        if self.template not in known and not self.template.endswith(".jinja"):
            raise UserError(
                f"unknown chat template {self.template!r}: choose {', '.join(known)} "
                "or a .jinja file"
            )

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> BoundChat:
        """Join the format with a tokenizer.

        Args:
            tokenizer: A fast tokenizer.

        Returns:
            What renders and encodes conversations.

        Raises:
            UserError: If the template cannot be found, rendered or split into prompt and response,
                or if the tokenizer pads with one of the response's closing tokens.
        """
        name = self.template
        if name == "auto":
            name = "backbone" if tokenizer.chat_template else "plain"
        text = find_template(name, tokenizer)
        return BoundChat(tokenizer, Path(name).stem, text, self.system_prompt, self.label_form)


class BoundChat:
    """A chat template joined with a tokenizer.

    Args:
        tokenizer: A fast tokenizer.
        template_name: What the template is called in reports.
        template_text: Jinja source.
        system_prompt: System message of conversations that have none.
        label_form: How a label is written; None as the template has it.

    Attributes:
        template_text: Jinja source as rendered, with the date frozen if it asks for one.
        template_hash: SHA-256 of ``template_text``.
        closing_text: What the template writes after an answer.
        closing_ids: Its ids, as they stand at the end of a response.
        system_prompt: As given.
        labels: Writes attribute labels behind the generation prompt.

    Raises:
        UserError: As ``ChatFormat.bind``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_name: str,
        template_text: str,
        system_prompt: str | None = None,
        label_form: str | None = None,
    ) -> None:
        template_text = freeze_date(template_text)
        self.tokenizer = tokenizer
        self.template_name = template_name
        self.template_text = template_text
        self.template_hash = hashlib.sha256(template_text.encode()).hexdigest()
        self.system_prompt = system_prompt
        self.labels = LabelEncoder(self, label_form)
        self._text_encoder = TextEncoder(tokenizer)
        bos = tokenizer.bos_token_id
        self._wants_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self.closing_text = self._find_closing_text()
        self.closing_ids = self._find_closing_ids()
        # What follows an answer is encoded behind this, where no space is put before it.
        closes_by_token = set(self.closing_ids[-1:]) & tokenizer.added_tokens_decoder.keys()
        self._lead = "a" + self.closing_text if closes_by_token else ""
        self._n_lead = len(self.encode([self._lead])[0])
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id in self.closing_ids:
            raise UserError(
                f"the tokenizer pads with {tokenizer.pad_token!r}, which also closes a response of "
                f"the chat template {template_name!r}: set backbone.tokenizer.pad_token to another"
            )

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Write a conversation as the template does, with BOS only if the template writes it.

        Args:
            messages: Chat messages.
            add_generation_prompt: Whether to open the next assistant message.

        Returns:
            The text.

        Raises:
            UserError: If the template refuses the messages.
        """
        return self._text_encoder.unmark(self._render(messages, add_generation_prompt))

    @cached_property
    def ids_hash(self) -> str:
        """Hash of what gives the ids of a conversation their meaning: tokenizer and template."""
        parts = [*tokenizer_parts(self.tokenizer), self.template_text]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def prompt_ids(
        self, messages: Sequence[Message], label: AttributeLabel | None = None
    ) -> list[int]:
        """Ids of a prompt through its generation prompt, with exactly one BOS if the model has one.

        Args:
            messages: Chat messages, the last one from the user.
            label: What the answer shall be like; None leaves that open.

        Returns:
            Ids, ``(P,)``, those of the label last.

        Raises:
            UserError: If the template refuses the messages, or cannot carry labels.
        """
        pieces = self.prompt_pieces(messages, self._render(messages, True))
        ids, _ = self.join_prompt(self.encode(pieces))
        return ids if label is None else ids + self.labels.ids(label)

    def prompt_pieces(self, messages: Sequence[Message], text: str) -> list[str]:
        """Cut a prompt's text at the answers that are marked ``train``.

        Such an answer is encoded apart, as a response is. So its ids and all before it are those of
        a group whose response it is.

        Args:
            messages: The prompt, its last message from the user.
            text: The prompt as ``split_texts`` gives it.

        Returns:
            Texts for ``encode`` and then ``join_prompt``: every second one is an answer with its
            closing, and what follows it begins with a lead that ``join_prompt`` takes off. An
            answer that the template writes otherwise in a prompt than as a response (Qwen3 leaves
            the thinking out) is not cut out, and so cannot be learned here.

        Raises:
            UserError: If the template refuses the messages.
        """
        pieces: list[str] = []
        lead, end = "", 0
        for i, message in enumerate(messages):
            if not message.get("train") or i == 0:  # nothing asks for what is said first
                continue
            try:
                before, (answer,) = self.split_texts(messages[:i], [message["content"]])
            except UserError:
                continue
            if text.startswith(before + answer) and len(before) >= end:
                pieces += [lead + text[end : len(before)], answer]
                end = len(before) + len(answer)
                lead = self._lead
        return [*pieces, lead + text[end:]]

    def join_prompt(
        self, pieces: Sequence[list[int]]
    ) -> tuple[list[int], npt.NDArray[np.bool_] | None]:
        """Ids of a prompt from those of its pieces, with exactly one BOS if the model has one.

        Args:
            pieces: Ids of the texts of ``prompt_pieces``.

        Returns:
            Ids ``(P,)``, and ``(P,)`` bool, which of them are learned; None if none is.
        """
        joined = [self.with_bos(pieces[0]), *pieces[1:]]
        joined[2::2] = [piece[self._n_lead :] for piece in joined[2::2]]
        is_answer = np.arange(len(joined)) % 2 == 1
        mask = np.repeat(is_answer, [len(piece) for piece in joined])
        return list(chain.from_iterable(joined)), mask if mask.any() else None

    def response_text(self, messages: Sequence[Message], answer: str) -> str:
        """What an answer adds to its prompt's text: the answer and the template's closing.

        Args:
            messages: The prompt, its last message from the user.
            answer: The assistant's text.

        Returns:
            The text, ending with ``closing_text``.

        Raises:
            UserError: As ``split_texts``.
        """
        return self._text_encoder.unmark(self.split_texts(messages, [answer])[1][0])

    def response_ids(self, messages: Sequence[Message], answer: str) -> tuple[list[int], int]:
        """Ids of a response.

        Args:
            messages: The prompt, its last message from the user.
            answer: The assistant's text.

        Returns:
            Ids ``(m,)``, and how many of them at the end are closing tokens.

        Raises:
            UserError: As ``split_texts``.
        """
        ids = self.encode(self.split_texts(messages, [answer])[1])[0]
        return ids, self.closing_count(ids)

    def whole_ids(self, messages: Sequence[Message], answer: str) -> list[int]:
        """Ids of prompt and answer encoded as one text: for comparison, nothing trains on them."""
        return self.with_bos(self.encode([self._render([*messages, _answer(answer)], False)])[0])

    def split_texts(
        self, messages: Sequence[Message], answers: Sequence[str], may_be_empty: bool = False
    ) -> tuple[str, list[str]]:
        """Texts of a prompt and its responses, for ``encode``; the prompt is rendered once.

        Args:
            messages: The prompt, its last message from the user.
            answers: The assistant's texts.
            may_be_empty: Whether an answer may be nothing but its closing, as a sampled one can.

        Returns:
            The prompt's text and a text for each answer; control tokens of the messages are marked.

        Raises:
            UserError: If an answer is empty as rendered, if the prompt's text does not begin the
                text of the whole conversation, or if the template refuses the messages.
        """
        prompt = self._render(messages, True)
        responses = []
        for answer in answers:
            whole = self._render([*messages, _answer(answer)], False)
            if not whole.startswith(prompt):
                self._refuse(
                    "the text of the prompt is not the beginning of the text with an answer, so a "
                    "response cannot be told from its prompt; use another template, such as plain"
                )
            text = whole[len(prompt) :]
            if not text.endswith(self.closing_text):
                self._refuse(f"an answer is not closed by {self.closing_text!r}")
            empty = not text[: len(text) - len(self.closing_text)].strip()
            if empty and not (may_be_empty and text):
                raise UserError("the response is empty")
            responses.append(text)
        return prompt, responses

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts from ``split_texts``, in one call of the tokenizer and with nothing added.

        Args:
            texts: Texts; marked control tokens in them are encoded as ordinary text.

        Returns:
            Ids of each text.
        """
        return self._text_encoder.encode(texts)

    def with_bos(self, ids: list[int]) -> list[int]:
        """Begin a prompt's ids with exactly one BOS, or with none if the model has none."""
        bos = self.tokenizer.bos_token_id
        written = sum(1 for _ in takewhile(lambda token: token == bos, ids))
        if written == 0:
            return [bos, *ids] if self._wants_bos else ids
        return ids[written - 1 :]

    @property
    def adds_bos(self) -> bool:
        """Whether ids begin with a BOS that the template does not write."""
        question: list[Message] = [{"role": "user", "content": "a"}]
        return self.prompt_ids(question) != self.encode([self.render(question, True)])[0]

    def closing_count(self, ids: Sequence[int]) -> int:
        """Closing tokens at the end of a response's ids.

        Fewer than ``closing_ids`` where a token spans the end of the answer and the closing.
        """
        pairs = zip(reversed(ids), reversed(self.closing_ids), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Render with the control tokens of the messages marked."""
        from jinja2.exceptions import TemplateError

        mark = self._text_encoder.mark
        conversation = [{"role": m["role"], "content": mark(m["content"])} for m in messages]
        if self.system_prompt is not None and (not messages or messages[0]["role"] != "system"):
            conversation.insert(0, {"role": "system", "content": mark(self.system_prompt)})
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    conversation,
                    chat_template=self.template_text,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    # Qwen3 opens a thinking block otherwise, which an answer would not continue.
                    enable_thinking=False,
                )
            )
        except TemplateError as error:
            self._refuse(str(error))

    def _find_closing_text(self) -> str:
        """Text after the answer of a made-up conversation."""
        text = self._render([{"role": "user", "content": "a"}, _answer(_PROBE)], False)
        before, found, closing = text.rpartition(_PROBE)
        if not found or _PROBE in before:
            self._refuse("it does not write the assistant's answer exactly once")
        return closing

    def _find_closing_ids(self) -> list[int]:
        """Ids of the closing behind an answer, where no space or BOS is put before it."""
        if not self.closing_text:
            return []
        alone, answer, closed = self.encode([self.closing_text, "a", "a" + self.closing_text])
        return closed[len(answer) :] if closed[: len(answer)] == answer else alone

    def _refuse(self, why: str) -> NoReturn:
        """Name the template in an error."""
        raise UserError(f"chat template {self.template_name!r}: {why}")


def _answer(text: str) -> Message:
    """An assistant message."""
    return {"role": "assistant", "content": text}
