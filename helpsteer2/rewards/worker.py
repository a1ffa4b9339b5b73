"""One thread that scores for many: requests wait in a bounded queue and share packed passes."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from helpsteer2.data.groups import Group
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.errors import UserError
from helpsteer2.rewards.scorer import RewardScorer, Scores

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many requests wait as may."""


class Unscorable(UserError):
    """A group that the chat template or the limits refuse."""


@dataclass(eq=False)
class _Request:
    """Groups that somebody waits for the scores of."""

    groups: Sequence[Group]
    answer: Future[list[Scores]] = field(default_factory=Future)
    encoded: list[TokenGroup] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return sum(group.n_tokens for group in self.encoded)


class ScoringWorker:
    """Loads a reward model in a thread of its own and scores there whatever is submitted.

    Tokeniser and model are used by that thread alone. A pass takes the requests in order, up to the
    scorer's ``tokens_per_microbatch``; it waits a moment for more if they are fewer.

    Args:
        load: Opens the reward model.
        max_waiting: Most requests in the queue.
        max_wait_seconds: How long a pass that is not full waits for more.
        on_loaded: Called in the thread once the model is there.
        on_failure: Called in the thread if the model cannot be loaded.

    Attributes:
        scorer: The scorer, None until it is loaded.
        failure: Why it could not be loaded.
    """

    def __init__(
        self,
        load: Callable[[], RewardScorer],
        max_waiting: int,
        max_wait_seconds: float,
        on_loaded: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.scorer: RewardScorer | None = None
        self.failure: Exception | None = None
        self._load, self._on_loaded, self._on_failure = load, on_loaded, on_failure
        self._max_wait = max_wait_seconds
        self._waiting: queue.Queue[_Request] = queue.Queue(max_waiting)
        self._left_over: _Request | None = None
        self._closed = threading.Event()
        # A daemon: nothing that hangs in a library may keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.start()

    def submit(self, groups: Sequence[Group]) -> Future[list[Scores]]:
        """Put groups into the queue.

        Args:
            groups: At least one.

        Returns:
            Will hold the ``(n, A)`` scores of each group, or ``Unscorable`` for one of them, or
            whatever else went wrong. Cancelled before its turn, it leaves the queue.

        Raises:
            QueueFull: If too many requests wait.
        """
        request = _Request(groups)
        try:
            self._waiting.put_nowait(request)
        except queue.Full:
            raise QueueFull from None
        request.answer.add_done_callback(lambda _: self._forget(request))
        return request.answer

    def _forget(self, request: _Request) -> None:
        """Give the place of a request that was cancelled to another."""
        with self._waiting.mutex, suppress(ValueError):  # it had its turn
            self._waiting.queue.remove(request)

    def close(self, seconds: float) -> bool:
        """End the thread after the pass it is in; of a model that is being loaded nobody waits.

        Args:
            seconds: How long to wait for that pass.

        Returns:
            Whether the thread has ended.
        """
        self._closed.set()
        if self.scorer is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.scorer = self._load()
        except Exception as error:
            self.failure = error
            self._on_failure()
            return
        self._on_loaded()
        while not self._closed.is_set():
            requests = self._next_pass(self.scorer)
            if requests:
                _score(self.scorer, requests)

    def _next_pass(self, scorer: RewardScorer) -> list[_Request]:
        """Requests that fill one pass, or all there are; none after a second without any."""
        requests: list[_Request] = []
        n_tokens, deadline = 0, time.monotonic() + 1.0
        while n_tokens < scorer.tokens_per_microbatch:
            request = self._take(deadline)
            if request is None:
                break
            if not request.encoded and not _encode(scorer, request):
                continue
            if requests and n_tokens + request.n_tokens > scorer.tokens_per_microbatch:
                self._left_over = request
                break
            if not requests:
                deadline = time.monotonic() + self._max_wait
            requests.append(request)
            n_tokens += request.n_tokens
        return requests

    def _take(self, deadline: float) -> _Request | None:
        """The next request; None if there is none until the deadline."""
        if self._left_over is not None:
            request, self._left_over = self._left_over, None
            return request
        try:
            return self._waiting.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None


def _encode(scorer: RewardScorer, request: _Request) -> bool:
    """Turn a request into ids; False if it was given up, or answered by an error."""
    if not request.answer.set_running_or_notify_cancel():
        return False
    for i, group in enumerate(request.groups):
        try:
            request.encoded.append(scorer.encode(group, i))
        except Exception as error:
            known = isinstance(error, UserError)
            _fail(request, Unscorable(f"groups[{i}]: {error}") if known else error)
            return False
    return True


def _score(scorer: RewardScorer, requests: Sequence[_Request]) -> None:
    """Answer some requests from one pass, or from more if one of them is longer than that."""
    try:
        scores = scorer.score_encoded(group for request in requests for group in request.encoded)
        for request in requests:
            request.answer.set_result([next(scores) for _ in request.encoded])
    except Exception as error:
        for request in requests:
            if not request.answer.done():
                _fail(request, error)


def _fail(request: _Request, error: Exception) -> None:
    if not isinstance(error, UserError):
        logger.exception("scoring failed")
    request.answer.set_exception(error)
