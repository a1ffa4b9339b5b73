"""A server of a reward model in this process, for tests that look inside."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer2.attributes import AttributeWeights
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.rewards.scorer import RewardScorer, Scores
from helpsteer2.rewards.server import RewardService, ServerLimits, application, server
from helpsteer2.rewards.wire import RequestLimits, request_body
from helpsteer2.rewards.worker import ScoringWorker
from tests.rewards.tiny import group

JSON = {"Content-Type": "application/json"}
BODY = request_body([group("Hi", "Hello")])


class HeldScorer(RewardScorer):
    """Scores only while it may; tells when it began, and how many groups each call had."""

    def __init__(self, scorer: RewardScorer) -> None:
        super().__init__(scorer.model, scorer.chat, scorer.tokens_per_microbatch)
        self.may_go, self.began = threading.Event(), threading.Event()
        self.calls: list[int] = []
        self.may_go.set()

    def score_encoded(self, groups: Iterable[TokenGroup]) -> Iterator[Scores]:
        groups = list(groups)
        self.calls.append(len(groups))
        self.began.set()
        assert self.may_go.wait(60)
        yield from super().score_encoded(groups)


@dataclass
class Running:
    """A server that runs: where, and what it scores with."""

    url: str
    port: int
    scorer: HeldScorer


@contextmanager
def serving(
    folder: Path,
    *,
    limits: ServerLimits | None = None,
    requests: RequestLimits | None = None,
    weights: AttributeWeights | None = None,
    tokens_per_microbatch: int = 8192,
    load: Callable[[HeldScorer], RewardScorer] = lambda scorer: scorer,
) -> Iterator[Running]:
    """Serve on a free port until the block ends."""
    limits = limits or ServerLimits()
    scorer = HeldScorer(
        RewardScorer.from_pretrained(folder, tokens_per_microbatch=tokens_per_microbatch)
    )
    worker = ScoringWorker(lambda: load(scorer), limits.max_waiting, 0.005)
    service = RewardService(worker, weights, requests or RequestLimits(), limits)
    running = server(application(service), limits)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    worker.start()
    thread.start()
    try:
        yield Running(f"http://127.0.0.1:{port}", port, scorer)
    finally:
        scorer.may_go.set()
        running.should_exit = True
        thread.join(30)
        worker.close(30)
        assert not thread.is_alive()


def ask(
    port: int, path: str = "/score", body: bytes | None = BODY, method: str = "POST", **headers: str
) -> tuple[int, Any, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {**JSON, **headers})
        response = connection.getresponse()
        content = response.read()
        return response.status, json.loads(content), response.headers
    finally:
        connection.close()


def wait_until_loaded(port: int) -> None:
    deadline = time.monotonic() + 30
    while ask(port, "/ready", None, "GET")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)
