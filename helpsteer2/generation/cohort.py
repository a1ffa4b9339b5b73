"""A cohort: prompts that began together, with what their samples are so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from helpsteer2.data.groups import FinishReason, Group
from helpsteer2.functional.sampling import stream_key
from helpsteer2.generation.kv_cache import CohortCache
from helpsteer2.generation.sampling import Sample, SamplingParams


@dataclass
class Request:
    """A prompt on its way.

    Attributes:
        group: The prompt.
        prompt_ids: Its ids.
        samples: Its samples by index, as they end.
    """

    group: Group
    prompt_ids: npt.NDArray[np.int32]
    samples: dict[int, Sample] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """A sample that has ended; attributes as in ``Sample``."""

    request: Request
    index: int
    ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...]


@dataclass
class Cohort:
    """Prompts that began together and their live samples, a row each.

    Attributes:
        requests: The prompts.
        cache: Keys and values.
        params: How to draw.
        stop_token_ids: Tokens that end a sample.
        keys: ``(B,)`` random streams of the live samples.
        last_ids: ``(B,)`` newest token of each.
        length: Tokens of every live sample.
    """

    requests: Sequence[Request]
    cache: CohortCache
    params: SamplingParams
    stop_token_ids: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64] = field(init=False)
    last_ids: npt.NDArray[np.int64] = field(init=False)
    length: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        n, seed = self.params.n, self.params.seed
        pairs = [(request, index) for request in self.requests for index in range(n)]
        self.keys = np.array(
            [stream_key(seed, request.group.id, index) for request, index in pairs], np.uint64
        )
        # Of each row the sample it is, and what was drawn for it.
        self._samples = np.arange(len(pairs))
        self._prompt_lengths = np.repeat([len(r.prompt_ids) for r in self.requests], n)
        self._ids = np.zeros((len(pairs), self.params.max_tokens), np.int32)
        self._logprobs = np.zeros((len(pairs), self.params.max_tokens), np.float32)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """``(B,)`` position of the newest token of each sample."""
        return self._prompt_lengths[self._samples] + (self.length - 1)

    def add(self, ids: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float32]) -> Iterator[Ended]:
        """Add a token to every live sample.

        Args:
            ids: ``(B,)``.
            logprobs: ``(B,)`` nats.

        Yields:
            The samples that end with it; they are live no more.
        """
        self._ids[self._samples, self.length] = ids
        self._logprobs[self._samples, self.length] = logprobs
        self.length += 1
        stopped = np.isin(ids, self.stop_token_ids)
        full = self.length == self.params.max_tokens
        ended = np.arange(len(ids)) if full else stopped.nonzero()[0]
        for row in ended.tolist():
            yield self._ended(int(self._samples[row]), "stop" if stopped[row] else "length")
        self.last_ids = ids
        if not len(ended):
            return
        if len(ended) == len(ids):
            self._samples = self._samples[:0]
            return
        order = self.cache.remove(ended.tolist())
        self._samples, self.keys = self._samples[order], self.keys[order]
        self.last_ids = ids[order]

    def _ended(self, sample: int, finish_reason: FinishReason) -> Ended:
        request = self.requests[sample // self.params.n]
        return Ended(
            request,
            sample % self.params.n,
            tuple(self._ids[sample, : self.length].tolist()),
            finish_reason,
            tuple(self._logprobs[sample, : self.length].tolist()),
        )

    @property
    def is_live(self) -> bool:
        """Whether any sample has not ended."""
        return bool(len(self._samples))
