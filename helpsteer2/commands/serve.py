"""``helpsteer2 serve``: a reward model behind HTTP, for many clients at once."""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING

from helpsteer2.attributes import AttributeWeights
from helpsteer2.commands.score import add_model_options, load_weights, whole_number
from helpsteer2.errors import UserError
from helpsteer2.rewards.wire import RequestLimits

if TYPE_CHECKING:
    from helpsteer2.rewards.scorer import RewardScorer

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C and SIGTERM: 128 + the signal, as shells have it."""

MAX_WAIT_SECONDS = 0.005
"""How long a pass that is not full waits for more requests."""

SPARE_FILES = 64
"""Open files of the process that are no connections."""

HELP = """\
Score responses over HTTP. Requests of all clients share packed passes of the model.

POST /score   {"groups": [{"prompt": [{"role": "user", "content": "…"}], "responses": ["…"]}]}
              gives {"model_hash", "attribute_names", "scores": [[[…]]]}, a list a group of a list
              a response, and "rewards" if there is a weighting
GET /health   the process answers        GET /ready  the model is loaded
GET /info     model hash, attributes, template, weighting and limits

There is no password and no encryption: keep the default host, or stand a proxy in front.
"""


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        argv: Arguments behind ``helpsteer2 serve``.

    Returns:
        Never 0: 130 after Ctrl-C (by ``KeyboardInterrupt``), 143 after SIGTERM.

    Raises:
        UserError: If the model or the weighting cannot be used, the address is taken, or FastAPI is
            not installed.
    """
    options = _options(argv)
    signal.signal(signal.SIGTERM, _terminate)
    weights = None if options.weights is None else load_weights(options.weights)
    try:
        from helpsteer2.rewards.server import RewardService, ServerLimits, application, server
    except ModuleNotFoundError as error:
        if error.name not in {"fastapi", "uvicorn", "starlette"}:
            raise
        raise UserError(
            f"{error.name} is not installed: pip install 'helpsteer2[serve]'"
        ) from error
    from helpsteer2.rewards.worker import ScoringWorker

    limits = ServerLimits(max_waiting=options.max_waiting)
    requests = RequestLimits(
        options.max_body_bytes, options.max_rows, options.max_characters, options.max_messages
    )
    _allow_connections(limits.max_connections)
    with _listen(options.host, options.port) as listener:
        url = _url(listener)
        worker = ScoringWorker(
            lambda: _load(options, weights),
            limits.max_waiting,
            MAX_WAIT_SECONDS,
            on_loaded=lambda: print(f"ready: {url}", flush=True),
            on_failure=lambda: setattr(running, "should_exit", True),
        )
        service = RewardService(worker, weights, requests, limits)
        running = server(application(service), limits)
        print(f"listening on {url}, loading {options.model}", flush=True)
        try:
            worker.start()
            running.run(sockets=[listener])
        except (KeyboardInterrupt, SystemExit) as signalled:
            if not worker.close(limits.shutdown_seconds):
                # Python would end beneath a library that the thread is in, which aborts then.
                code = TERMINATED if isinstance(signalled, SystemExit) else INTERRUPTED
                atexit.register(os._exit, code)
            raise
    # A signal would have been raised again; so the model could not be loaded.
    assert worker.failure is not None
    raise worker.failure


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "helpsteer2 serve", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = RequestLimits()
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine")
    parser.add_argument(
        "--port", type=int, default=8000, help="default: %(default)s; 0: a free one"
    )
    for flag, value, what in (
        ("--max-waiting", 256, "requests that wait; one more is answered by 503"),
        ("--max-body-bytes", default.max_body_bytes, "bytes of one request"),
        ("--max-rows", default.max_rows, "responses in one request"),
        ("--max-messages", default.max_messages, "messages of all prompts in one request"),
        ("--max-characters", default.max_characters, "characters of one text"),
    ):
        parser.add_argument(
            flag,
            type=whole_number,
            default=value,
            metavar="N",
            help=f"{what} (default: %(default)s)",
        )
    options = parser.parse_args(argv)
    if not 0 <= options.port < 1 << 16:
        parser.error(f"--port has to be from 0 to 65535, got {options.port}")
    return options


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def _load(options: argparse.Namespace, weights: AttributeWeights | None) -> RewardScorer:
    """Load the model and all that requests ask of it."""
    from helpsteer2.rewards.scorer import RewardScorer

    scorer = RewardScorer.from_pretrained(
        options.model,
        dtype=options.dtype,
        attention=options.attention,
        tokens_per_microbatch=options.batch_tokens,
    )
    if weights is not None:
        weights.vector(scorer.attribute_names)
    _ = scorer.model_hash  # takes a while, and is kept
    return scorer


def _listen(host: str, port: int) -> socket.socket:
    """Take the address before anything is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port or "
            "--host"
        ) from error
    if not listener.getsockname()[0].startswith(("127.", "::1")):
        print(f"anybody who reaches {host} can use this server", file=sys.stderr)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _allow_connections(count: int) -> None:
    """Raise the number of open files that the system allows this process, as far as it may."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
