"""A reward model behind HTTP: ``POST /score``, ``GET /health``, ``/ready`` and ``/info``.

FastAPI and uvicorn, and not LitServe, which is built on both: it batches by requests where a packed
pass is filled by tokens, it starts processes and ZeroMQ for that, and it bounds neither the body
of a request nor the time that a client takes to send one.

FastAPI reads what handlers ask for from their annotations, so it is imported here and not inside
functions; only ``helpsteer2 serve`` imports this module.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from helpsteer2.attributes import AttributeWeights
from helpsteer2.errors import UserError
from helpsteer2.rewards.scorer import RewardScorer, Scores
from helpsteer2.rewards.wire import (
    MAX_PROBLEMS,
    REQUEST_SCHEMA,
    Refusal,
    RequestLimits,
    parse_request,
)
from helpsteer2.rewards.worker import QueueFull, ScoringWorker, Unscorable

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1
"""What a client that is sent away is told to wait."""

HEAD_BYTES = 16 << 10
"""Longest request line with headers."""


@dataclass(frozen=True)
class ServerLimits:
    """What all clients together may take.

    Args:
        max_waiting: Requests that wait for the model; one more is answered by 503.
        max_pending_bytes: Bodies of all requests being read, waiting or scored. Of more, those that
            have been arriving for the longest are answered by 503.
        max_connections: Open connections; one more is closed at once.
        head_seconds: Time for the headers of a request to arrive.
        body_seconds: Time for its body.
        answer_seconds: Time for its answer to leave this process; then the connection is closed.
        idle_seconds: Time that a connection may stay open between requests.
        shutdown_seconds: Time that requests in flight have to end once the server is stopped.
    """

    max_waiting: int = 256
    max_pending_bytes: int = 256 << 20
    max_connections: int = 4096
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    answer_seconds: float = 30.0
    idle_seconds: float = 60.0
    shutdown_seconds: float = 60.0


class RewardService:
    """What the paths of the server do.

    Args:
        worker: Scores.
        weights: Weighting of the reward; None for the model's own, if it has one.
        request_limits: Of one request.
        limits: Of all of them.
    """

    def __init__(
        self,
        worker: ScoringWorker,
        weights: AttributeWeights | None,
        request_limits: RequestLimits,
        limits: ServerLimits,
    ) -> None:
        self._worker = worker
        self._weights = weights
        self._request_limits = request_limits
        self._limits = limits
        self._pending_bytes = 0
        self._reading: dict[asyncio.Task[int], bytearray] = {}  # from the oldest to the newest

    async def health(self) -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    async def ready(self) -> dict[str, str]:
        """Whether the model is loaded; 503 until then."""
        self._scorer()
        return {"status": "ready"}

    async def info(self) -> dict[str, Any]:
        """What the scores are, and what a request may hold."""
        scorer = self._scorer()
        weights = self._weights or scorer.model.spec.weights
        return {
            "model_hash": scorer.model_hash,
            "attribute_names": list(scorer.attribute_names),
            "template_name": scorer.chat.template_name,
            "template_hash": scorer.chat.template_hash,
            "weights": None if weights is None else asdict(weights),
            "limits": asdict(self._request_limits),
        }

    async def score(self, request: Request) -> JSONResponse:
        """Scores of every response, and its reward if there is a weighting."""
        scorer = self._scorer()
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise Refusal(415, "the body has to be JSON, with Content-Type: application/json")
        body = bytearray()
        try:
            await self._read(request, body)
            # Beside the event loop, which has to answer others meanwhile.
            groups = await asyncio.to_thread(parse_request, bytes(body), self._request_limits)
            scores = await _unless_gone(request, self._worker.submit(groups))
        except QueueFull:
            raise Refusal(503, "too many requests wait: try again") from None
        except Unscorable as error:
            raise Refusal(422, "a group cannot be scored", [str(error)]) from error
        except UserError as error:
            logger.error("%s", error)
            raise Refusal(500, str(error)) from error
        finally:
            self._pending_bytes -= len(body)
        return JSONResponse(self._answer(scorer, scores))

    def _scorer(self) -> RewardScorer:
        if self._worker.scorer is None:
            raise Refusal(503, "the model is being loaded: try again")
        return self._worker.scorer

    async def _read(self, request: Request, body: bytearray) -> None:
        """Read a body that may be too long or never end; what is too long is read and dropped.

        A client that is answered while it still sends may never see the answer.
        """
        limit = self._request_limits.max_body_bytes
        reading = asyncio.ensure_future(self._read_all(request, body, limit))
        self._reading[reading] = body
        try:
            await asyncio.wait({reading}, timeout=self._limits.body_seconds)
        finally:
            self._reading.pop(reading, None)
            reading.cancel()
        if not reading.done():
            raise Refusal(408, "the body did not arrive in time")
        if reading.cancelled():
            raise Refusal(503, "too many bytes wait: try again")
        if (size := reading.result()) > limit:
            raise Refusal(413, f"a body of {size:,} bytes, at most {limit:,}")

    async def _read_all(self, request: Request, body: bytearray, limit: int) -> int:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                self._drop(body)
                continue
            body += chunk
            self._pending_bytes += len(chunk)
            self._make_room()
        return size

    def _make_room(self) -> None:
        """Put out bodies until all that is left fits.

        Whoever has been sending for the longest goes first. So slow clients make room for others,
        however many they are, and a body that arrives at once is refused only if those that wait
        for the model leave no room.
        """
        while self._pending_bytes > self._limits.max_pending_bytes and self._reading:
            reading = next(iter(self._reading))
            body = self._reading.pop(reading)
            if reading.cancel():  # or else it has just arrived whole
                self._drop(body)

    def _drop(self, body: bytearray) -> None:
        self._pending_bytes -= len(body)
        body.clear()

    def _answer(self, scorer: RewardScorer, scores: Sequence[Scores]) -> dict[str, Any]:
        bad = [i for i, of_group in enumerate(scores) if not np.isfinite(of_group).all()]
        if bad:  # another attempt would give the same
            problems = [f"groups[{i}]: the scores are not finite" for i in bad[:MAX_PROBLEMS]]
            raise Refusal(422, "a group cannot be scored", problems)
        names = scorer.attribute_names
        weights = self._weights or scorer.model.spec.weights
        answer: dict[str, Any] = {
            "model_hash": scorer.model_hash,
            "attribute_names": list(names),
            "scores": [of_group.tolist() for of_group in scores],
        }
        if weights is not None:
            answer["rewards"] = [weights.reward(of_group, names).tolist() for of_group in scores]
        return answer


async def _unless_gone(request: Request, future: Future[list[Scores]]) -> list[Scores]:
    """Wait for scores as long as the client does; what nobody waits for leaves the queue."""
    answer = asyncio.wrap_future(future)
    # The body is read whole, so what comes next is that the client goes away.
    gone = asyncio.ensure_future(request.receive())
    either: set[asyncio.Future[Any]] = {answer, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        gone.cancel()
        answer.cancel()


def application(service: RewardService) -> FastAPI:
    """The paths of the server.

    Args:
        service: What they do.
    """
    # Its pages of documentation would load scripts from elsewhere; /openapi.json needs none.
    app = FastAPI(title="helpsteer2 reward model", docs_url=None, redoc_url=None)
    app.get("/health")(service.health)
    app.get("/ready")(service.ready)
    app.get("/info")(service.info)
    body = {"required": True, "content": {"application/json": {"schema": REQUEST_SCHEMA}}}
    app.post("/score", openapi_extra={"requestBody": body}, response_model=None)(service.score)
    app.exception_handler(Refusal)(_refused)
    app.exception_handler(ClientDisconnect)(_gone)
    return app


async def _refused(request: Request, refusal: Refusal) -> JSONResponse:
    """Say why; whoever did not send a whole body has to connect again."""
    headers = {}
    if refusal.status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if refusal.status in (408, 503):
        headers["Connection"] = "close"
    content = {"error": refusal.message, "problems": refusal.problems}
    return JSONResponse(content, refusal.status, headers)


async def _gone(request: Request, error: ClientDisconnect) -> JSONResponse:
    """Nobody reads this."""
    return JSONResponse({"error": "the client went away", "problems": []}, 400)


def server(app: FastAPI, limits: ServerLimits) -> uvicorn.Server:
    """A server that no number of slow clients can fill.

    ``run(sockets=[…])`` serves until SIGTERM or Ctrl-C, ends what is in flight, and raises the
    signal again.

    Args:
        app: The paths.
        limits: What clients may take.
    """

    class Protocol(_ImpatientProtocol):
        head_seconds = limits.head_seconds
        answer_seconds = limits.answer_seconds
        max_connections = limits.max_connections

    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=Protocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=limits.max_connections,
        timeout_keep_alive=int(limits.idle_seconds),
        timeout_graceful_shutdown=int(limits.shutdown_seconds),
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    return uvicorn.Server(config)


class _ImpatientProtocol(H11Protocol):
    """Closes connections that are too many, that send no headers or that take no answer in time.

    uvicorn itself waits for each without end. A client that does not read has nothing but its
    connection: the model is done with its request, and an answer is short.
    """

    head_seconds: float
    answer_seconds: float
    max_connections: int
    _deadline: asyncio.TimerHandle | None = None
    _answer_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Whatever the socket does not take at once pauses writing, and starts the clock.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._deadline = self.loop.call_later(self.head_seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_clock()  # the headers are there
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.head_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer_deadline = self.loop.call_later(self.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_answer_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self._stop_answer_clock()
        super().connection_lost(exc)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _stop_answer_clock(self) -> None:
        if self._answer_deadline is not None:
            self._answer_deadline.cancel()
            self._answer_deadline = None
