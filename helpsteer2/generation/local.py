"""Sampling in process: shared unpadded prefill, continuous batching, one token a sample a step.

Prompts of like length begin together as a *cohort*. They run through the decoder in packed rows,
each once for all its samples, while their keys and values are kept. Then each step is one row of
one token for every live sample of every cohort, so linear layers work on (samples, hidden). A
sample that ends leaves at once; when enough have left, the next cohort begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from helpsteer2.data.groups import Group
from helpsteer2.data.packing import pack
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.errors import UserError
from helpsteer2.functional.sampling import Truncation, draw
from helpsteer2.generation.cohort import Cohort, Ended, Request
from helpsteer2.generation.decode_attention import (
    DecodeContext,
    PrefillContext,
    check_window,
    sliding_window,
)
from helpsteer2.generation.kv_cache import CohortCache
from helpsteer2.generation.sampling import Sample, SamplingParams, response_text
from helpsteer2.models.attention import check_span, row_hidden_states
from helpsteer2.models.export import no_progress_bar
from helpsteer2.models.policy import Policy

if TYPE_CHECKING:
    from helpsteer2.data.chat import BoundChat

PADDING = {"cpu": 256, "cuda": 65536}
"""Tokens by which the prompts of a cohort are padded at the most. To read so many costs about as
much as the kernels of one more cohort."""


@dataclass(frozen=True)
class LocalEngine:
    """Samples in this process.

    Args:
        max_rows: Most samples at a time; the n samples of one prompt are always taken together.
        cache_tokens: Tokens whose keys and values are counted at the most, those that samples may
            still take included. Up to twice as many are held, as ended samples give their room back
            half by half.
        prefill_tokens: Prompt tokens of one forward pass; a longer prompt gets a pass of its own.
        prompts_per_block: Prompts that are sampled to their end before the next ones begin. It
            makes a run repeatable to the last bit from the beginning of any block, and costs a
            little speed at their ends.
        device: ``auto`` is the first GPU, or else the CPU.

    Raises:
        UserError: If a limit is below 1.
    """

    max_rows: int = 128
    cache_tokens: int = 131072
    prefill_tokens: int = 8192
    prompts_per_block: int = 64
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name in ("max_rows", "cache_tokens", "prefill_tokens", "prompts_per_block"):
            if getattr(self, name) < 1:
                raise UserError(f"engine.{name} must be at least 1, got {getattr(self, name)}")

    @property
    def identity(self) -> dict[str, str | int | None]:
        """Device and block, on which the last bits of log-probs depend."""
        return {
            "kind": "local",
            "device": self.device,
            "prompts_per_block": self.prompts_per_block,
        }

    def open(
        self,
        model: str,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: Literal["auto", "sdpa", "flex", "flash"] = "auto",
    ) -> LocalSampler:
        """Load the policy.

        Args:
            model: Folder or Hub id of an export, of its adapter, or of any causal LM with a chat
                template.
            dtype: Of the weights.
            attention: Backend of packed attention, for the prompts.

        Raises:
            UserError: If it cannot be used.
        """
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with no_progress_bar():
            policy, _, _ = Policy.from_pretrained(model, dtype, attention, device)
        return LocalSampler(policy, self)


class LocalSampler:
    """Samples from a policy in this process.

    Args:
        policy: On its device, in eval mode.
        engine: How much at a time.

    Attributes:
        chat: The policy's chat format.
        ids_hash: Tokenizer and template that the ids belong to.
        label_attributes: What the labels of the policy's training were of.
        prompts_per_block: As the engine has it.
        prefilled_tokens: Prompt tokens that went through the model so far.
    """

    def __init__(self, policy: Policy, engine: LocalEngine) -> None:
        self.policy = policy
        self.engine = engine
        self.chat: BoundChat = policy.spec.chat
        self.ids_hash = self.chat.ids_hash
        self.label_attributes = policy.spec.label_attributes
        self.prompts_per_block = engine.prompts_per_block
        self.prefilled_tokens = 0
        head = policy.lm_head
        # Logits are fp32. On the CPU the factors are as well, as in ``chunked_logprobs``.
        in_fp32 = head.weight.device.type == "cpu"
        self._head = head.weight.detach().float() if in_fp32 else head.weight.detach()
        self._head_bias = None if head.bias is None else head.bias.detach().float()
        self._config = policy.backbone.config.get_text_config()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: the template's end of a turn, and the model's own EOS."""
        generation = self.policy.causal_lm.generation_config
        eos = None if generation is None else generation.eos_token_id
        own = eos if isinstance(eos, list) else [eos]
        stops = [self.policy.spec.stop_token_id, self.chat.tokenizer.eos_token_id, *own]
        return tuple(sorted({token for token in stops if token is not None}))

    def check(self, prompt_tokens: int, params: SamplingParams, name: str) -> None:
        """Find out whether a prompt of some length can be answered.

        Args:
            prompt_tokens: Its tokens; shorter ones can be answered then, too.
            params: How to draw.
            name: What the prompt is called in a message.

        Raises:
            UserError: If a limit is too small for it.
        """
        span = prompt_tokens + params.max_tokens
        try:
            check_span(self._config, span, "sampling.max_tokens or max_prompt_tokens")
            check_window("the policy", sliding_window(self._config), span)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        room, needed = self.engine.cache_tokens, prompt_tokens + params.n * params.max_tokens
        if needed > room:
            raise UserError(
                f"engine.cache_tokens={room} is too small: {name} with n={params.n} responses of "
                f"up to {params.max_tokens} tokens takes {needed}"
            )

    def sample(
        self, prompts: Iterable[Group], params: SamplingParams
    ) -> Iterator[tuple[Group, list[Sample]]]:
        """Sample n responses of each prompt; see ``Sampler``.

        Raises:
            UserError: If a prompt cannot be rendered or a limit is too small for it, before any is
                sampled; or the memory is too small, or the model gives no numbers.
        """
        requests = [self._request(group, params) for group in prompts]
        for first in range(0, len(requests), self.prompts_per_block):
            yield from self._sample_block(requests[first : first + self.prompts_per_block], params)

    def _sample_block(
        self, block: list[Request], params: SamplingParams
    ) -> Iterator[tuple[Group, list[Sample]]]:
        """Continuous batching over the prompts of a block."""
        waiting = _Waiting(block, self.engine, params, PADDING[self._head.device.type])
        stops = np.array(sorted({*self.stop_token_ids, *params.stop_token_ids}))
        truncation = Truncation(params.temperature, params.top_k, params.top_p)
        cohorts: list[Cohort] = []
        while cohorts or waiting.requests:
            for begun in waiting.next_cohorts([cohort.cache for cohort in cohorts]):
                cohorts.append(Cohort(begun, self._cache(begun, params), params, stops))
                with self._memory_told():
                    ended = self._begin(cohorts[-1], truncation)
                yield from self._completed(ended, params.n)
            cohorts = [cohort for cohort in cohorts if cohort.is_live]
            if cohorts:
                with self._memory_told():
                    ended = self._step(cohorts, truncation)
                yield from self._completed(ended, params.n)
                cohorts = [cohort for cohort in cohorts if cohort.is_live]

    @contextmanager
    def _memory_told(self) -> Iterator[None]:
        """Say what takes less memory, if there is too little."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            limits = ("cache_tokens", "max_rows", "prefill_tokens")
            told = ", ".join(f"engine.{name}={getattr(self.engine, name)}" for name in limits)
            raise UserError(f"out of memory with {told}: lower one of them") from error

    def _request(self, group: Group, params: SamplingParams) -> Request:
        ids = np.asarray(self.chat.prompt_ids(group.prompt, group.label), np.int32)
        if len(ids) < 2:
            raise UserError(f"prompt {group.id}: the chat template makes {len(ids)} tokens")
        self.check(len(ids), params, f"prompt {group.id}")
        return Request(group, ids)

    def _cache(self, requests: list[Request], params: SamplingParams) -> CohortCache:
        lengths = [len(request.prompt_ids) for request in requests]
        n_layers, device = self._config.num_hidden_layers, self._head.device
        return CohortCache(lengths, params.n, params.max_tokens, n_layers, device)

    @torch.inference_mode()
    def _begin(self, cohort: Cohort, truncation: Truncation) -> list[Ended]:
        """Run the prompts of a cohort, and draw the first token of every sample."""
        hidden, first = [], 0
        for part in _parts(cohort.requests, self.engine.prefill_tokens):
            # The last token stands as a response: its hidden state is what tells the next one.
            batch = pack(
                [
                    TokenGroup(
                        prompt_ids=request.prompt_ids[:-1],
                        response_ids=(request.prompt_ids[-1:],),
                        attributes=np.empty((1, 0), np.float32),
                        preference_strength=float("nan"),
                        index=index,
                    )
                    for index, request in enumerate(part)
                ]
            ).to(self._head.device)
            context = PrefillContext(batch, cohort.cache, first)
            states = row_hidden_states(
                self.policy.backbone, batch.input_ids, batch.position_ids, context
            )
            hidden.append(states[batch.last_tokens])
            first += len(part)
            self.prefilled_tokens += batch.layout.n_tokens
        logits = self._logits(torch.cat(hidden)).repeat_interleave(cohort.params.n, dim=0)
        return self._draw([cohort], logits, truncation)

    @torch.inference_mode()
    def _step(self, cohorts: list[Cohort], truncation: Truncation) -> list[Ended]:
        """One more token for every live sample."""
        for cohort in cohorts:
            cohort.cache.begin_token()
        device = self._head.device
        ids = np.concatenate([cohort.last_ids for cohort in cohorts])
        positions = np.concatenate([cohort.positions for cohort in cohorts])
        hidden = row_hidden_states(
            self.policy.backbone,
            torch.from_numpy(ids).to(device),
            torch.from_numpy(positions).to(device),
            DecodeContext([cohort.cache for cohort in cohorts]),
        )
        return self._draw(cohorts, self._logits(hidden), truncation)

    def _logits(self, hidden: Tensor) -> Tensor:
        """``(B, V)`` float32, whatever autocast says."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self._head.dtype)
            if self._head.dtype == torch.float32:
                return torch.nn.functional.linear(hidden, self._head, self._head_bias)
            logits = torch.mm(hidden, self._head.T, out_dtype=torch.float32)
            return logits if self._head_bias is None else logits.add_(self._head_bias)

    @staticmethod
    def _draw(cohorts: list[Cohort], logits: Tensor, truncation: Truncation) -> list[Ended]:
        """Draw a token for every row and hand them to the cohorts."""
        keys = np.concatenate([cohort.keys for cohort in cohorts])
        rows = [len(cohort.keys) for cohort in cohorts]
        places = np.repeat([cohort.length for cohort in cohorts], rows)
        try:
            drawn = draw(logits, truncation, keys, places)
        except ValueError as error:
            raise UserError(
                f"{error}: the policy's weights are broken, or dtype=bfloat16 is too narrow for "
                "them"
            ) from error
        tokens, logprobs = (part.cpu().numpy() for part in drawn)
        ends = np.cumsum(rows)[:-1]
        parts = zip(cohorts, np.split(tokens, ends), np.split(logprobs, ends), strict=True)
        return [ended for cohort, ids, values in parts for ended in cohort.add(ids, values)]

    def _completed(self, ended: Iterable[Ended], n: int) -> Iterator[tuple[Group, list[Sample]]]:
        """Groups whose last sample has ended."""
        for one in ended:
            text = response_text(self.chat, one.ids, one.finish_reason)
            samples = one.request.samples
            samples[one.index] = Sample(one.ids, text, one.finish_reason, one.logprobs)
            if len(samples) == n:
                yield one.request.group, [samples[index] for index in range(n)]


class _Waiting:
    """Prompts that have not begun, of which those of like length begin together.

    Args:
        block: The prompts.
        engine: How much at a time.
        params: How to draw.
        padding: Tokens by which the prompts of a cohort may be padded.

    Attributes:
        requests: Those that are left, by length.
    """

    def __init__(
        self, block: list[Request], engine: LocalEngine, params: SamplingParams, padding: int
    ) -> None:
        self.requests = sorted(block, key=lambda request: len(request.prompt_ids))
        self._engine = engine
        self._params = params
        self._padding = padding

    def next_cohorts(self, running: Sequence[CohortCache]) -> Iterator[list[Request]]:
        """Prompts that begin now: none unless a quarter of the rows is free.

        Args:
            running: Caches of the live cohorts.

        Yields:
            The prompts of one cohort each.
        """
        n, engine = self._params.n, self._engine
        most_rows = max(engine.max_rows, n)
        free_rows = most_rows - sum(cache.rows for cache in running)
        free_tokens = engine.cache_tokens - sum(cache.reserved_tokens for cache in running)
        if running and 4 * free_rows < most_rows:
            return
        while free_rows >= n and self.requests:
            # From the end: the longest first, which decides what every prompt of the cohort takes.
            longest = len(self.requests[-1].prompt_ids)
            each = longest + n * self._params.max_tokens
            room = min(free_rows // n, free_tokens // each)
            if room < 1:
                return
            begun = self._taken(room, longest)
            yield begun
            free_rows -= n * len(begun)
            free_tokens -= each * len(begun)

    def _taken(self, room: int, longest: int) -> list[Request]:
        """The longest prompts there are, as long as they are of like length."""
        begun: list[Request] = []
        padding = 0
        while self.requests and len(begun) < room:
            padding += longest - len(self.requests[-1].prompt_ids)
            if padding > self._padding:
                break
            begun.append(self.requests.pop())
        return begun


def _parts(requests: Iterable[Request], most_tokens: int) -> Iterator[list[Request]]:
    """Runs of prompts of so many tokens at the most."""
    part: list[Request] = []
    total = 0
    for request in requests:
        if part and total + len(request.prompt_ids) > most_tokens:
            yield part
            part, total = [], 0
        part.append(request)
        total += len(request.prompt_ids)
    if part:
        yield part
