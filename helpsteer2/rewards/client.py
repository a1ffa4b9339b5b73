"""A reward model behind ``helpsteer2 serve``, used like one in this process."""

from __future__ import annotations

import http.client
import json
import random
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from helpsteer2.data.groups import Group
from helpsteer2.errors import UserError
from helpsteer2.rewards.wire import RequestLimits, request_body

Scores = npt.NDArray[np.float32]

TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""Answers that another attempt may change."""

MAX_ANSWER_BYTES = 64 << 20
"""A longer answer is not one of ours."""

CONNECT_SECONDS = 5.0
"""To accept a connection; a host that is down does not answer at all."""

FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.5, 30.0
"""Before the second attempt, doubled from one to the next; and the longest."""


class RewardClient:
    """Scores groups over HTTP; the same interface as ``RewardScorer``.

    Args:
        url: Of the server, ``http://127.0.0.1:8000``.
        concurrency: Requests in flight.
        rows_per_request: Most responses in one of them, unless a group has more.
        timeout_seconds: Longest silence of the server once it has accepted a connection.
        attempts: Most attempts of one request. They wait ½, 1, 2, … 30 seconds for each other, or
            as long as the server asks: ten of them bear a minute or more without a server.

    Raises:
        UserError: If the url or a number makes no sense.
    """

    def __init__(
        self,
        url: str,
        concurrency: int = 8,
        rows_per_request: int = 16,
        timeout_seconds: float = 600.0,
        attempts: int = 10,
    ) -> None:
        for name, value in (
            ("concurrency", concurrency),
            ("rows_per_request", rows_per_request),
            ("timeout_seconds", timeout_seconds),
            ("attempts", attempts),
        ):
            if value <= 0:
                raise UserError(f"{name} has to be above 0, got {value}")
        self.url = url.rstrip("/")
        self._address = _Address.of(self.url)
        self._concurrency = concurrency
        self._rows_per_request = rows_per_request
        self._timeout = timeout_seconds
        self._attempts = attempts
        self._info: _Info | None = None

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the A scores; asks the server once."""
        return self._server().attribute_names

    @property
    def model_hash(self) -> str:
        """Hash of the server's model; asks the server once."""
        return self._server().model_hash

    def score(self, groups: Iterable[Group]) -> Iterator[Scores]:
        """Score groups as they come, several requests at a time.

        Args:
            groups: Prompts with n ≥ 1 responses each; ratings are not looked at.

        Yields:
            ``(n, A)`` float32 of each group, in order, some requests behind the input.

        Raises:
            UserError: If the server stays away, refuses a group, has another model than before, or
                answers nonsense.
        """
        info = self._server()
        lines = _Lines(self.url, self._address, self._timeout, self._attempts)
        waiting: deque[Future[list[Scores]]] = deque()
        with lines, ThreadPoolExecutor(self._concurrency) as pool:
            try:
                for request in _requests(groups, info.limits, self._rows_per_request):
                    waiting.append(pool.submit(_score, lines, info, request))
                    if len(waiting) > self._concurrency:
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()
            finally:
                # Of use only if this ends early; then no thread may wait for an answer any more.
                pool.shutdown(wait=False, cancel_futures=True)
                lines.close()

    def _server(self) -> _Info:
        if self._info is None:
            with _Lines(self.url, self._address, self._timeout, self._attempts) as lines:
                self._info = _Info.of(lines.ask("GET", "/info"), self.url)
        return self._info


@dataclass(frozen=True)
class _Address:
    """Where a server is."""

    secure: bool
    host: str
    port: int | None
    path: str

    @classmethod
    def of(cls, url: str) -> _Address:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UserError(f"url={url}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise UserError(f"url={url}: expected http://HOST:PORT")
        if parts.username is not None:
            raise UserError("url: a name or password in it would be stored with the run: leave it")
        return cls(parts.scheme == "https", parts.hostname, port, parts.path)

    def connection(self, timeout: float) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=min(timeout, CONNECT_SECONDS))


@dataclass(frozen=True)
class _Info:
    """What a server says of itself."""

    model_hash: str
    attribute_names: tuple[str, ...]
    limits: RequestLimits

    @classmethod
    def of(cls, answer: Any, url: str) -> _Info:
        try:
            names, hashed = answer["attribute_names"], answer["model_hash"]
            if not names or not all(isinstance(text, str) for text in [*names, hashed]):
                raise ValueError
            limits = {name: int(value) for name, value in answer["limits"].items()}
            return cls(hashed, tuple(names), RequestLimits(**limits))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{url}/info is no answer of `helpsteer2 serve`") from error


class _Lines:
    """Connections to a server, one a thread, all closed together.

    Args:
        url: Of the server, for messages.
        address: The same, taken apart.
        timeout: Longest silence, in seconds.
        attempts: Most attempts of one request.
    """

    def __init__(self, url: str, address: _Address, timeout: float, attempts: int) -> None:
        self._url, self._address = url, address
        self._timeout, self._attempts = timeout, attempts
        self._own = threading.local()
        self._all: list[http.client.HTTPConnection] = []
        self._closed = threading.Event()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection; threads that wait at one see it break, and give up."""
        self._closed.set()
        for connection in self._all:
            if (sock := connection.sock) is not None:
                try:
                    sock.shutdown(2)  # both ways; closing alone would not wake a thread
                except OSError:
                    continue

    def ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        """Send a request until it is answered.

        Args:
            method: ``GET`` or ``POST``.
            path: Behind the url.
            body: JSON.

        Returns:
            The answer, parsed.

        Raises:
            UserError: If every attempt failed, or the server refused the request.
        """
        problem, answered = "", False
        for attempt in range(self._attempts):
            delay = _delay(attempt)
            try:
                status, headers, content = self._once(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                problem, answered = _told(error, self._timeout), False
            else:
                if status == 200:
                    return _parsed(content, f"{self._url}{path}")
                problem, answered = _refusal(status, content), True
                if status not in TRY_AGAIN:
                    raise UserError(f"{self._url}{path} refused a request: {problem}")
                delay = _asked_delay(headers, delay)
            if attempt + 1 < self._attempts and self._closed.wait(delay):
                break
        if answered:
            times = f"{self._attempts} times, the last time"
            raise UserError(f"{self._url}{path} failed {times}: {problem}")
        raise UserError(
            f"{self._url}{path} gave no answer in {self._attempts} attempts, the last time: "
            f"{problem}. Is `helpsteer2 serve` running there?"
        )

    def _once(
        self, method: str, path: str, body: bytes | None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One attempt; two if a connection that had been idle turns out to be closed."""
        connection = getattr(self._own, "connection", None)
        if connection is not None and connection.sock is not None:
            try:
                return self._exchange(connection, method, path, body)
            except ConnectionError:
                if self._closed.is_set():
                    raise
        if connection is None:
            connection = self._own.connection = self._address.connection(self._timeout)
            self._all.append(connection)
        _connect(connection, self._timeout)
        if self._closed.is_set():  # by a thread that did not see this connection yet
            raise ConnectionAbortedError("given up")
        return self._exchange(connection, method, path, body)

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.request(method, self._address.path + path, body, headers)
            response = connection.getresponse()
            content = response.read(MAX_ANSWER_BYTES)
            if not response.isclosed() or response.length:
                raise http.client.IncompleteRead(content, response.length)
            return response.status, response.headers, content
        except BaseException:
            connection.close()
            raise


@dataclass(frozen=True)
class _Request:
    """Some groups as one body."""

    groups: list[Group]
    body: bytes


def _requests(
    groups: Iterable[Group], limits: RequestLimits, rows_per_request: int
) -> Iterator[_Request]:
    """Groups put together up to a number of responses, and to what the server takes."""
    rows = min(rows_per_request, limits.max_rows)
    waiting: list[Group] = []
    for group in groups:
        n_waiting = sum(len(other.responses) for other in waiting)
        if waiting and n_waiting + len(group.responses) > rows:
            yield from _cut(waiting, limits)
            waiting = []
        waiting.append(group)
    if waiting:
        yield from _cut(waiting, limits)


def _cut(groups: list[Group], limits: RequestLimits) -> Iterator[_Request]:
    """One request, or several if it would hold more than the server takes."""
    body, n_messages = request_body(groups), sum(len(group.prompt) for group in groups)
    too_much = len(body) > limits.max_body_bytes or n_messages > limits.max_messages
    if too_much and len(groups) > 1:
        middle = len(groups) // 2
        yield from _cut(groups[:middle], limits)
        yield from _cut(groups[middle:], limits)
    else:
        yield _Request(groups, body)


def _score(lines: _Lines, info: _Info, request: _Request) -> list[Scores]:
    """Scores of the groups of one request."""
    try:
        answer = lines.ask("POST", "/score", request.body)
    except UserError as error:
        first = request.groups[0]
        more = f" and {len(request.groups) - 1} more" if len(request.groups) > 1 else ""
        raise UserError(f"{error} (group {first.id!r}, {first.source}{more})") from error
    shape = [(len(group.responses), len(info.attribute_names)) for group in request.groups]
    try:
        if answer["model_hash"] != info.model_hash:
            raise UserError(
                "the server's model is another one than at the beginning: what is scored so far "
                "does not go with it, begin again"
            )
        scores = [np.array(of_group, dtype=np.float32) for of_group in answer["scores"]]
        names = tuple(answer["attribute_names"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError("the answer to /score is none of `helpsteer2 serve`") from error
    if [of_group.shape for of_group in scores] != shape or names != info.attribute_names:
        raise UserError("the answer to /score does not fit its request: other shapes or attributes")
    return scores


def _connect(connection: http.client.HTTPConnection, timeout: float) -> None:
    """Open a connection, soon or not at all; its answers may take longer."""
    try:
        connection.connect()
    except TimeoutError as error:
        raise ConnectionError(f"no connection in {connection.timeout:g} seconds") from error
    connection.sock.settimeout(timeout)


def _delay(attempt: int) -> float:
    """Seconds to wait after an attempt; by chance shorter, so that clients do not come together."""
    longest: float = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2**attempt)
    return longest * random.uniform(0.5, 1.0)


def _asked_delay(headers: http.client.HTTPMessage, delay: float) -> float:
    """As long as the server asks, within reason."""
    asked = headers.get("Retry-After", "")
    return max(delay, min(float(asked), LONGEST_DELAY_SECONDS)) if asked.isdigit() else delay


def _told(error: Exception, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer for {timeout:g} seconds"
    return str(error) or type(error).__name__


def _parsed(content: bytes, place: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} answered something that is no JSON: is it our server?") from error


def _refusal(status: int, content: bytes) -> str:
    """What an answer says of its reason, in short."""
    try:
        answer = json.loads(content)
        texts: Sequence[Any] = [answer.get("error", answer.get("detail", "")), *answer["problems"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        texts = []
    told = "; ".join(str(text)[:200] for text in texts[:6] if text)
    return f"{status} {http.client.responses.get(status, '')}" + (f": {told}" if told else "")
