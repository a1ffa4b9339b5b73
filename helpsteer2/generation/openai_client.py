"""HTTP with an OpenAI-compatible server: bounded, tried again, every failure told in words."""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from helpsteer2.errors import UserError

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger(__name__)

CONNECT_SECONDS, FIRST_SECONDS = 5.0, 20.0
"""Seconds to accept a connection, and to answer the very first question."""

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
"""Seconds before the first repetition, doubled for each further one up to the second figure."""

LONGEST_ANSWER = 64 * 2**20
"""Bytes of an answer that are read at most."""

WARNING_SECONDS = 30.0
"""At most one warning about repetitions in so much time."""

_PASSING = frozenset({408, 425, 429, 502, 503, 504})
_TRIES_OF_500 = 5
_SHOWN = 400


class _Passing(Exception):
    """A failure that may be gone in a moment."""

    def __init__(self, what: str, retry_after: float = 0.0, tries: int | None = None) -> None:
        super().__init__(what)
        self.retry_after = retry_after
        self.tries = tries


class CompletionClient:
    """Asks one server for completions, from several threads at once.

    Failures that may pass (429, 5xx, timeouts, lost connections) are tried again, with a delay that
    doubles and varies at random, or as long as the server asks for (``Retry-After``).

    Args:
        base_url: Where the API begins, as ``http://localhost:8000/v1``.
        api_key_variable: Name of the environment variable that holds the server's key, or None.
        timeout: Seconds that one try may take.
        deadline: Seconds that a request may take with all its tries.
        connections: Connections open at once.

    Attributes:
        retries: Tries that failed and were repeated.

    Raises:
        UserError: If the address cannot be one, or there is no key where one is promised.
    """

    def __init__(
        self,
        base_url: str,
        api_key_variable: str | None,
        timeout: float,
        deadline: float,
        connections: int,
    ) -> None:
        import httpx2

        host = check_address(base_url)
        self._url = base_url.rstrip("/")
        self._timeout, self._deadline = timeout, deadline
        self._key = _read_key(api_key_variable)
        self._http = httpx2.Client(
            # Compressed answers could grow beyond the bound in one chunk.
            headers={"Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            limits=httpx2.Limits(
                max_connections=connections,
                max_keepalive_connections=connections,
                keepalive_expiry=2.0,  # servers hang up after five
            ),
            trust_env=host not in ("localhost", "127.0.0.1", "::1"),  # no proxy on the way home
        )
        # Its log has a line for each request.
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._warned = float("-inf")
        self._jitter = random.Random()  # its own: the seeds of a run are not touched
        self.retries = 0

    def stop_trying(self) -> None:
        """Let what is on its way finish, but begin nothing again."""
        self._stopped.set()

    def close(self) -> None:
        """Give up everything and close the connections."""
        self._stopped.set()
        self._http.close()

    def models(self) -> list[str]:
        """Names of the server's models, in one try.

        Raises:
            UserError: If nothing listens, or it is no such server.
        """
        response, content = self._first_contact()
        try:
            entries = self._answer("/models", response, content).get("data")
        except _Passing as error:
            raise self._no_server(error) from error
        if not isinstance(entries, list):
            raise UserError(f"{self._url} is no OpenAI-compatible server: /models has no list")
        return [str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry]

    def check_listening(self) -> None:
        """See that something speaks HTTP there, whatever it says.

        Raises:
            UserError: If nothing does.
        """
        self._first_contact()

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Ask for completions, again and again until the deadline.

        Args:
            body: The request.

        Returns:
            The answer, an object.

        Raises:
            UserError: If the server refuses it, answers nonsense, or does not answer in time.
        """
        start, tries = time.monotonic(), 0
        while True:
            left = max(self._deadline - (time.monotonic() - start), 0.01)
            try:
                answer = self._exchange("POST", "/completions", body, min(self._timeout, left))
                return self._answer("/completions", *answer)
            except _Passing as error:
                tries += 1
                delay = max(error.retry_after, self._delay(tries))
                left = self._deadline - (time.monotonic() - start)
                often = error.tries is not None and tries >= error.tries
                if often or delay >= left or self._stopped.is_set():
                    raise self._given_up(error, tries) from error
                self._note_retry(error, left)
                if self._stopped.wait(delay):
                    raise self._given_up(error, tries) from error

    def _first_contact(self) -> tuple[httpx2.Response, bytes]:
        """Ask for the models, once."""
        try:
            return self._exchange("GET", "/models", None, min(self._timeout, FIRST_SECONDS))
        except _Passing as error:
            raise self._no_server(error) from error

    def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float
    ) -> tuple[httpx2.Response, bytes]:
        """One request and its answer."""
        import httpx2

        timeout = httpx2.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds))
        try:
            with self._http.stream(
                method, self._url + path, json=body, timeout=timeout
            ) as response:
                content = self._read(response, seconds)
        except httpx2.ConnectTimeout as error:
            raise _Passing("the connection was not accepted in time") from error
        except httpx2.TimeoutException as error:
            raise _Passing(f"no answer within {seconds:.3g} s") from error
        except httpx2.ConnectError as error:
            raise _Passing(f"nothing listens there ({error})") from error
        except httpx2.DecodingError as error:
            raise UserError(f"{self._url}{path} answered what cannot be decoded") from error
        except (httpx2.TransportError, RuntimeError) as error:  # RuntimeError: closed meanwhile
            raise _Passing(f"the connection was lost ({error})") from error
        return response, content

    def _read(self, response: httpx2.Response, seconds: float) -> bytes:
        """Read an answer, bounded in size and time."""
        end = time.monotonic() + seconds
        content = bytearray()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > LONGEST_ANSWER:
                raise UserError(
                    f"{self._url}: an answer of more than {LONGEST_ANSWER >> 20} MiB was refused"
                )
            if time.monotonic() > end:
                raise _Passing(f"no whole answer within {seconds:.3g} s")
        return bytes(content)

    def _answer(self, path: str, response: httpx2.Response, content: bytes) -> dict[str, Any]:
        """The object that the server answered."""
        if response.status_code != 200:
            raise self._refusal(path, response, content)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._url}{path} answered no JSON{self._told(content)}") from error
        if not isinstance(answer, dict):
            raise UserError(f"{self._url}{path} answered no JSON object{self._told(content)}")
        return answer

    def _refusal(self, path: str, response: httpx2.Response, content: bytes) -> Exception:
        """What a status other than 200 means."""
        status, wait = response.status_code, _retry_after(response.headers)
        told = f"status {status}{self._told(content)}"
        if status in _PASSING:
            return _Passing(told, wait)
        if status == 500:  # may be the request's own fault
            return _Passing(told, wait, _TRIES_OF_500)
        return UserError(f"{self._url}{path} refused the request: {told}{_advice(status)}")

    def _told(self, content: bytes) -> str:
        """What the server said about itself, short and without the key."""
        text = content[: 16 * _SHOWN].decode("utf-8", "replace")
        try:
            told = json.loads(text)
            told = told.get("error", told.get("detail", told))
            text = str(told.get("message", told) if isinstance(told, dict) else told)
        except (ValueError, AttributeError, RecursionError):
            pass
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return f": {text[:_SHOWN]}{' …' if len(text) > _SHOWN else ''}" if text else ""

    def _delay(self, tries: int) -> float:
        longest = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(tries - 1, 20))
        with self._lock:
            return longest * self._jitter.uniform(0.5, 1.0)

    def _note_retry(self, error: _Passing, left: float) -> None:
        """Count a repetition, and say so now and then."""
        with self._lock:
            self.retries += 1
            now = time.monotonic()
            if now - self._warned < WARNING_SECONDS:
                return
            self._warned = now
        logger.warning("%s: %s; trying again for up to %.0f s", self._url, error, left)

    def _no_server(self, error: _Passing) -> UserError:
        return UserError(f"no server to sample from at {self._url}: {error}")

    def _given_up(self, error: _Passing, tries: int) -> UserError:
        times = "once" if tries == 1 else f"{tries} times"
        return UserError(
            f"{self._url} gave no answer, asked {times}: {error}. See that the server runs, then "
            "run the same command again: finished prompts are kept"
        )


def check_address(base_url: str) -> str:
    """Refuse what is no address of a server, or would put a password into the records.

    Args:
        base_url: Where the API begins.

    Returns:
        The host.

    Raises:
        UserError: If it is none.
    """
    try:
        url = urlsplit(base_url)
        host, _ = url.hostname, url.port
    except ValueError as error:
        raise UserError(f"base_url is no address: {error}") from error
    if url.username is not None or url.password is not None:
        raise UserError(
            "base_url holds a name or password, which the records of the run would show: put the "
            "key into an environment variable and name that in api_key_variable"
        )
    if url.scheme not in ("http", "https") or not host or url.query or url.fragment:
        raise UserError(f"base_url={base_url!r} is no address like http://localhost:8000/v1")
    return host


def _read_key(variable: str | None) -> str | None:
    """The key out of the environment."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"api_key_variable={variable!r}: there is no such environment variable")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the environment variable {variable} holds no key: not printable ASCII")
    return key


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait: a number or a date."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value)) if value else 0.0
    except ValueError:
        pass
    try:
        wait = parsedate_to_datetime(value) - datetime.now(timezone.utc)
    except (ValueError, TypeError):
        return 0.0
    return max(0.0, wait.total_seconds())


def _advice(status: int) -> str:
    if status in (401, 403):
        return "; name the environment variable that holds its key in api_key_variable"
    if status == 404:
        return "; does base_url end like http://localhost:8000/v1, and does the server have that?"
    return "; is it another kind of server than `server` says?"
