"""Sampling by an OpenAI-compatible server: vLLM, SGLang, ``transformers serve`` and others.

Requests go to ``/v1/completions``, so the chat template stays ours: prompts leave as the very ids
of ``data/chat.py`` where the server takes ids, and elsewhere as text that becomes them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.groups import Group, unmarked
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.errors import UserError
from helpsteer2.functional.sampling import stream_key
from helpsteer2.generation.openai_client import CompletionClient, check_address
from helpsteer2.generation.openai_servers import (
    SERVERS,
    Answer,
    Choice,
    ServerName,
    read_answer,
    request_body,
)
from helpsteer2.generation.openai_threads import in_threads
from helpsteer2.generation.sampling import Sample, SamplingParams, response_text
from helpsteer2.models.loading import load_tokenizer, local_folder
from helpsteer2.models.policy_export import PolicySpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenAIEngine:
    """Samples by a server that has the policy loaded.

    Args:
        base_url: Where its API begins: ``http://localhost:8000/v1``.
        server: Its kind. ``openai`` stands for any other: text alone, and no top-k.
        served_model: Name of the policy there, if the server has several models.
        concurrency: Requests on their way at once.
        timeout: Seconds that one try of a request may take.
        deadline: Seconds that a request may take with all its tries; then sampling ends.
        api_key_variable: Name of the environment variable that holds the server's key.

    Raises:
        UserError: If a value is out of range.
    """

    base_url: str
    server: ServerName
    served_model: str | None = None
    concurrency: int = 64
    timeout: float = 600.0
    deadline: float = 1800.0
    api_key_variable: str | None = None

    def __post_init__(self) -> None:
        check_address(self.base_url)
        if self.server not in SERVERS:
            raise UserError(f"engine.server={self.server!r}: choose {', '.join(SERVERS)}")
        if self.concurrency < 1 or not 0 < self.timeout <= self.deadline:
            raise UserError(
                "engine: concurrency must be at least 1, timeout above 0 and deadline not below "
                f"it, got {self.concurrency}, {self.timeout} and {self.deadline}"
            )

    @property
    def identity(self) -> dict[str, str | int | None]:
        """Kind of server, and the model's name there; it may move to another address."""
        return {"kind": "openai", "server": self.server, "served_model": self.served_model}

    def open(
        self,
        model: str,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: Literal["auto", "sdpa", "flex", "flash"] = "auto",
    ) -> OpenAISampler:
        """Find out that the server can be used, and read the policy's tokenizer.

        Args:
            model: Folder or Hub id of the policy that the server has; its weights are not read.
            dtype: Not used: the server has its own.
            attention: Not used.

        Raises:
            UserError: If nothing listens there, the server lacks the model, or the folder is none
                of a policy.
        """
        client = self.connect()
        try:
            served_model = self._model(client)
        finally:
            client.close()
        return OpenAISampler(self, served_model, *_without_weights(model))

    def connect(self) -> CompletionClient:
        """A client of the server."""
        return CompletionClient(
            self.base_url, self.api_key_variable, self.timeout, self.deadline, self.concurrency
        )

    def _model(self, client: CompletionClient) -> str | None:
        """Name of the model to ask for, None for the only one."""
        kind, wanted = SERVERS[self.server], self.served_model
        try:
            if not kind.lists_models:
                client.check_listening()
                return wanted
            names = client.models()
        except UserError as error:
            raise UserError(f"{error}. To start one: {kind.start}") from error
        listed = ", ".join(names) or "none"
        if wanted is not None and wanted not in names:
            raise UserError(f"the server has no model {wanted!r} (served_model); it has {listed}")
        if wanted is None and len(names) != 1:
            raise UserError(f"set engine.served_model to a model that the server has: {listed}")
        return wanted or names[0]


@dataclass
class ServerCounts:
    """What happened on the way.

    Attributes:
        requests: Requests that were answered.
        retries: Tries that failed and were repeated.
        reencoded: Samples whose ids are their text encoded again, which need not be those that were
            sampled: the server tells none.
        without_logprobs: Samples without usable log-probs.
    """

    requests: int = 0
    retries: int = 0
    reencoded: int = 0
    without_logprobs: int = 0


class OpenAISampler:
    """Samples from one model of a server.

    A request's seed depends on the seed, the group's id and the sample's index alone. vLLM keeps to
    it whatever else it computes, up to rounding; SGLang only if it is started with
    ``--enable-deterministic-inference``; ``transformers serve`` seeds its one generator anew at
    each request, so its samples repeat with ``concurrency=1`` alone.

    Args:
        engine: Which server, and how it is asked.
        served_model: Name of the model there, None for the only one.
        chat: The policy's chat format.
        stop_token_ids: Tokens that end a response; the first is the chat's end of a turn.
        vocabulary: How many tokens the policy knows.
        label_attributes: What the labels of the policy's training were of.

    Attributes:
        chat: The policy's chat format.
        ids_hash: Tokenizer and template that the ids belong to.
        label_attributes: What the labels of the policy's training were of.
        prompts_per_block: 1: each prompt stands alone.
        counts: What happened so far.
    """

    def __init__(
        self,
        engine: OpenAIEngine,
        served_model: str | None,
        chat: BoundChat,
        stop_token_ids: Sequence[int],
        vocabulary: int,
        label_attributes: tuple[str, ...] | None = (),
    ) -> None:
        self.engine = engine
        self.served_model = served_model
        self.chat = chat
        self.ids_hash = chat.ids_hash
        self.label_attributes = label_attributes
        self.prompts_per_block = 1  # the server mixes prompts as it likes
        self.stop_token_ids = tuple(stop_token_ids)
        self.vocabulary = vocabulary
        self.counts = ServerCounts()

    def sample(
        self, prompts: Iterable[Group], params: SamplingParams
    ) -> Iterator[tuple[Group, list[Sample]]]:
        """Sample n responses of each prompt; see ``Sampler``.

        If a request fails for good, those on their way are still waited for and given.

        Raises:
            UserError: If the server cannot draw like that, refuses a request, answers nonsense or
                no more, or if a prompt cannot be sent.
        """
        SERVERS[self.engine.server].check(params)
        if self.engine.server == "transformers" and self.engine.concurrency > 1:
            logger.info("transformers serve repeats its samples only with engine.concurrency=1")
        client = self.engine.connect()
        try:
            yield from _Run(self, client, params).groups(prompts)
        finally:
            client.close()
            self.counts.retries += client.retries


@dataclass
class _Prompt:
    """A group on its way, and its samples by index as they arrive."""

    group: Group
    ids: list[int]
    sent: str | list[int]
    samples: dict[int, Sample]


@dataclass(frozen=True)
class _Request:
    """A request for ``n`` samples of a prompt, from index ``first``."""

    prompt: _Prompt
    first: int
    n: int
    seed: int


class _Run:
    """One pass over prompts."""

    def __init__(
        self, sampler: OpenAISampler, client: CompletionClient, params: SamplingParams
    ) -> None:
        self.sampler, self.client, self.params = sampler, client, params
        self.chat, self.counts = sampler.chat, sampler.counts
        self.kind = SERVERS[sampler.engine.server]
        self.end_of_turn = sampler.stop_token_ids[0]
        self.stops = tuple(dict.fromkeys([*sampler.stop_token_ids, *params.stop_token_ids]))
        self.failure: Exception | None = None

    def groups(self, prompts: Iterable[Group]) -> Iterator[tuple[Group, list[Sample]]]:
        """Groups with their samples; a failure is raised when nothing is left to wait for."""
        concurrency = self.sampler.engine.concurrency
        for request, answer in in_threads(self._ask, self._requests(prompts), concurrency):
            prompt = request.prompt
            try:
                self._take(request, answer)
            except UserError as error:
                self._fail(UserError(f"{prompt.group.source}: {error}"))
            else:
                if len(prompt.samples) == self.params.n:
                    yield prompt.group, [prompt.samples[i] for i in range(self.params.n)]
        if self.failure is not None:
            raise self.failure

    def _fail(self, error: Exception) -> None:
        """End at the next chance, without trying anything again."""
        self.failure = self.failure or error
        self.client.stop_trying()

    def _requests(self, prompts: Iterable[Group]) -> Iterator[_Request]:
        n = self.params.n if self.kind.several else 1
        for group in prompts:
            try:
                ids = self.chat.prompt_ids(group.prompt, group.label)
                sent = ids if self.kind.ids else self._as_text(group, ids)
            except UserError as error:
                self._fail(UserError(f"{group.source}: {error}"))
                return
            prompt = _Prompt(group, ids, sent, {})
            # 30 bits: some servers take no more than 32, with a sign.
            seed = stream_key(self.params.seed, group.id, 0) >> 34
            for first in range(0, self.params.n, n):
                if self.failure is not None:
                    return
                yield _Request(prompt, first, n, seed + first)

    def _as_text(self, group: Group, ids: list[int]) -> str:
        """The text that the server's tokenizer turns into these ids."""
        text = self.chat.render(group.prompt, add_generation_prompt=True)
        if group.label is not None:
            text += self.chat.labels.text(group.label)
        text_ids = self.chat.with_bos(self.chat.encode([text])[0])
        if text_ids != ids:
            marks = text_ids == self.chat.prompt_ids(unmarked(group).prompt, group.label)
            why = (
                "answers in it are marked `train`"
                if marks
                else "it spells out control tokens, or a token spans its end and its label"
            )
            raise UserError(
                f"as text the prompt would get other ids on the server, because {why}: leave that "
                "out, or use a server that takes ids (vllm, sglang)"
            )
        bos = self.chat.tokenizer.bos_token
        if self.chat.with_bos([]):  # the server's tokenizer puts one in front of any text
            while text.startswith(bos):
                text = text[len(bos) :]
        return text

    def _ask(self, request: _Request) -> Answer:
        """Runs on a thread: no tokenizer here, they are not made for several."""
        body = request_body(
            self.kind,
            self.sampler.served_model,
            request.prompt.sent,
            self.params,
            request.seed,
            request.n,
            self.stops,
        )
        return read_answer(self.client.complete(body), request.n)

    def _take(self, request: _Request, answer: Answer | Exception) -> None:
        """Keep the samples of an answer."""
        if isinstance(answer, Exception):
            raise answer
        n_tokens = len(request.prompt.ids)
        if answer.prompt_tokens not in (None, n_tokens):
            raise UserError(
                f"the server counts {answer.prompt_tokens} tokens in a prompt of {n_tokens}: its "
                "tokenizer is not the policy's, or it adds tokens"
            )
        self.counts.requests += 1
        for index, choice in enumerate(answer.choices, request.first):
            sample = self._sample(request.prompt, choice)
            self.counts.without_logprobs += sample.logprobs is None
            request.prompt.samples[index] = sample

    def _sample(self, prompt: _Prompt, choice: Choice) -> Sample:
        """A completion as ids with their meaning."""
        reason = choice.finish_reason
        if choice.ids is None:
            self.counts.reencoded += 1
            ids = self._encode_again(prompt, choice.text)
            # Cut before it had any text, it held control tokens alone: which ones, nobody knows.
            ids = (*ids, self.end_of_turn) if reason == "stop" or not ids else ids
            return Sample(ids, choice.text, reason, None)
        ids, logprobs = choice.ids, choice.logprobs
        strange = [token for token in ids if not 0 <= token < self.sampler.vocabulary]
        if strange:
            raise UserError(
                f"the server answered token {strange[0]}, and the policy has no more than "
                f"{self.sampler.vocabulary}: it serves another model"
            )
        if self.params.temperature != 1 and not self.kind.raw_logprobs:
            logprobs = None
        if reason == "stop" and (not ids or ids[-1] not in self.stops):
            ids, logprobs = (*ids, self.end_of_turn), None  # the server kept what ended it
        return Sample(ids, response_text(self.chat, ids, reason), reason, logprobs)

    def _encode_again(self, prompt: _Prompt, text: str) -> tuple[int, ...]:
        """Ids of a text as a response to its prompt, without the closing."""
        _, responses = self.chat.split_texts(prompt.group.prompt, [text], may_be_empty=True)
        ids = self.chat.encode(responses)[0]
        return tuple(ids[: len(ids) - self.chat.closing_count(ids)])


def _without_weights(model: str) -> tuple[BoundChat, tuple[int, ...], int, tuple[str, ...] | None]:
    """What a sampler has to know of a policy, in the order of its arguments."""
    folder = local_folder(model, "policy")
    tokenizer = load_tokenizer(folder)
    spec = PolicySpec.read(folder, tokenizer)
    if spec is None:  # a model of others; nothing is cut here, so its limits do not matter
        chat = ChatFormat("backbone").bind(tokenizer)
        limits = LengthLimits(2**31, 2**31)
        spec = PolicySpec(chat, limits, folder.name, label_attributes=None)
    stops = [spec.stop_token_id, tokenizer.eos_token_id, *_own_stops(folder)]
    found = tuple(dict.fromkeys(token for token in stops if token is not None))
    if not found:
        raise UserError(f"{model}: its tokenizer has no token that ends a response")
    return spec.chat, found, _vocabulary(folder, tokenizer), spec.label_attributes


def _own_stops(folder: Path) -> list[int]:
    """Tokens that end a text by the model's generation config."""
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        return []
    return own if isinstance(own, list) else [own]


def _vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the model may sample: often a few more than its tokenizer can name."""
    from transformers import AutoConfig

    named = 1 + max(tokenizer.get_vocab().values())
    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError):  # there is only the tokenizer, or a model that we do not know
        return named
    return max(named, config.vocab_size)
