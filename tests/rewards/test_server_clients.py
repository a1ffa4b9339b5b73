"""Clients that are slow, deaf or gone take nothing from others."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from helpsteer2.rewards.server import ServerLimits
from tests.rewards.serving import BODY, ask, serving, wait_until_loaded
from tests.rewards.tiny import tiny_reward_model

HEAD = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_model(tmp_path_factory.mktemp("clients"))


@pytest.mark.parametrize("what", ["nothing", "head", "body"])
def test_slow_clients_are_put_out_while_others_are_served(folder: Path, what: str) -> None:
    start = {
        "nothing": b"",
        "head": HEAD + b"X-Slow: ",
        "body": HEAD + b"Content-Length: 10000\r\n\r\n{",
    }[what]
    limits = ServerLimits(head_seconds=2, body_seconds=2)
    with serving(folder, limits=limits) as running:
        wait_until_loaded(running.port)
        slow = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(200)]
        for client in slow:
            client.sendall(start)
        assert ask(running.port)[0] == 200
        answers = [ending(client, b"a" if start else b"") for client in slow]
        assert all(b"408" in answer if what == "body" else not answer for answer in answers)
        assert ask(running.port)[0] == 200


def ending(client: socket.socket, more: bytes) -> bytes:
    """What a client that is never quiet for long, and never ready, is told at its end."""
    client.settimeout(0.5)
    with client:
        for _ in range(60):
            with contextlib.suppress(TimeoutError):
                return client.recv(4096)
            client.sendall(more)
    raise AssertionError("the client was not put out")


def test_a_connection_too_many_is_closed(folder: Path) -> None:
    with serving(folder, limits=ServerLimits(max_connections=3)) as running:
        held = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(3)]
        time.sleep(0.2)
        one_more = socket.create_connection(("127.0.0.1", running.port), timeout=30)
        with one_more, contextlib.suppress(ConnectionResetError):
            assert one_more.recv(1) == b""
        for client in held:
            client.close()
        wait_until_loaded(running.port)
        assert ask(running.port)[0] == 200


def begun(port: int, n_bytes: int) -> socket.socket:
    """A client that has sent the beginning of a body."""
    client = socket.create_connection(("127.0.0.1", port), timeout=30)
    client.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + b" " * n_bytes)
    return client


def test_bodies_that_wait_for_the_model_are_bounded(folder: Path) -> None:
    body = BODY.ljust(1_400)
    with serving(folder, limits=ServerLimits(max_pending_bytes=3_000)) as running:
        wait_until_loaded(running.port)
        running.scorer.may_go.clear()
        with ThreadPoolExecutor(2) as pool:
            held = [pool.submit(ask, running.port, body=body) for _ in range(2)]
            assert running.scorer.began.wait(30)
            time.sleep(0.3)
            status, answer, headers = ask(running.port, body=body)
            assert (status, answer["error"]) == (503, "too many bytes wait: try again")
            assert headers["Retry-After"] == "1"
            running.scorer.may_go.set()
            assert [answer.result()[0] for answer in held] == [200, 200]
        assert ask(running.port, body=body)[0] == 200


def test_a_body_that_arrives_whole_takes_the_place_of_the_slowest(folder: Path) -> None:
    with serving(folder, limits=ServerLimits(max_pending_bytes=3_000)) as running:
        wait_until_loaded(running.port)
        with begun(running.port, 1_400) as first:
            time.sleep(0.3)
            with begun(running.port, 1_400) as second:
                time.sleep(0.3)
                assert ask(running.port, body=BODY.ljust(500))[0] == 200
                assert b"too many bytes wait" in first.recv(4096)
                second.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    second.recv(1)  # there is room for it
                assert ask(running.port, body=BODY.ljust(2_500))[0] == 200
                assert b"too many bytes wait" in second.recv(4096)
        assert ask(running.port, body=b" " * 3_001)[0] == 503


def test_bodies_that_come_together_are_scored_or_sent_away(folder: Path) -> None:
    with serving(folder, limits=ServerLimits(max_pending_bytes=100_000)) as running:
        wait_until_loaded(running.port)
        with ThreadPoolExecutor(16) as pool:
            done = pool.map(lambda _: status(running.port, BODY.ljust(40_000)), range(200))
            assert set(done) <= {200, 503, None}
        assert ask(running.port, body=BODY.ljust(100_000))[0] == 200  # no byte is still counted


@pytest.mark.slow
def test_a_thousand_slow_bodies_delay_nobody(folder: Path, many_files: None) -> None:
    limits = ServerLimits(max_pending_bytes=1 << 20, body_seconds=600)
    with serving(folder, limits=limits) as running, contextlib.ExitStack() as stack:
        wait_until_loaded(running.port)
        for _ in range(1_000):
            stack.enter_context(begun(running.port, 2_000))
        ask(running.port, "/health", None, "GET")  # they have begun
        time.sleep(2)  # they fill all there is
        for body in (BODY.ljust(1_000), BODY.ljust(500_000), BODY.ljust(1_000)):
            begin = time.monotonic()
            assert ask(running.port, body=body)[0] == 200
            assert time.monotonic() - begin < 30  # a twentieth of what the slow ones take


@pytest.fixture
def many_files() -> Iterator[None]:
    """Both ends of a thousand connections."""
    resource = pytest.importorskip("resource", reason="needs to open many files")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 4096:
        pytest.skip("the system allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft if soft < 0 else max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_client_that_goes_away_harms_nobody(folder: Path) -> None:
    with serving(folder) as running:
        wait_until_loaded(running.port)
        running.scorer.may_go.clear()
        with begun(running.port, 50):
            pass
        with socket.create_connection(("127.0.0.1", running.port)) as whole:
            whole.sendall(WHOLE)
            assert running.scorer.began.wait(30)
        running.scorer.may_go.set()
        assert ask(running.port)[0] == 200


def test_requests_of_clients_that_went_away_are_not_scored(folder: Path) -> None:
    with serving(folder, limits=ServerLimits(max_waiting=2)) as running:
        wait_until_loaded(running.port)
        running.scorer.may_go.clear()
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(ask, running.port)
            assert running.scorer.began.wait(30)
            for _ in range(4):  # twice as many as may wait
                with socket.create_connection(("127.0.0.1", running.port)) as leaving:
                    leaving.sendall(WHOLE)
                    time.sleep(0.2)
            time.sleep(0.2)
            others = [pool.submit(ask, running.port) for _ in range(2)]
            time.sleep(0.2)
            running.scorer.may_go.set()
            assert [answer.result()[0] for answer in [first, *others]] == [200] * 3
        assert sum(running.scorer.calls) == 3


def test_a_client_that_never_reads_is_put_out(folder: Path) -> None:
    limits = ServerLimits(max_connections=1, answer_seconds=1)
    with serving(folder, limits=limits) as running:
        wait_until_loaded(running.port)
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", running.port))
        deaf.settimeout(1)
        with deaf:
            with contextlib.suppress(OSError):
                while True:  # until no more answers fit between the two
                    deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 100)
            deadline = time.monotonic() + 30
            while status(running.port) != 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)


def status(port: int, body: bytes = BODY) -> int | None:
    """Status of the answer, None if the connection is closed instead."""
    try:
        return ask(port, body=body)[0]
    except (OSError, http.client.HTTPException):
        return None
