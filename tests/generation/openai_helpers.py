"""A small completion server that can misbehave, and a tiny policy to sample from."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Reply = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""

Misbehave = Callable[[int, dict[str, Any]], Reply | None]
"""The number of the request and its body, to what is answered in place of samples."""

STOP = 2
FIELDS = {
    *("model", "prompt", "n", "seed", "max_tokens", "temperature", "top_p"),
    *("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("ignore_eos", "stop_token_ids", "return_token_ids", "logprobs"),
}


def error(status: int, message: str, **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message}}).encode()
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, body


def first(n: int, reply: Reply) -> Misbehave:
    """The same answer to the first n requests, then samples."""
    return lambda count, body: reply if count <= n else None


def drawn(seed: int, stops: tuple[int, ...] = ()) -> list[int]:
    """What the server samples for a seed: letters, then a stop token."""
    draw = random.Random(seed)
    ids = [*(draw.randint(40, 90) for _ in range(draw.randint(2, 9))), STOP]
    return ids[: 1 + next(place for place, token in enumerate(ids) if token in (STOP, *stops))]


class CompletionServer(ThreadingHTTPServer):
    """Speaks as much of vLLM's protocol as is asked for, on a free port of this machine."""

    daemon_threads = True

    def __init__(
        self,
        misbehave: Misbehave = lambda count, body: None,
        models: tuple[str, ...] = ("policy",),
        seconds: float = 0.0,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.misbehave, self.models, self.seconds = misbehave, models, seconds
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def complete(self, body: dict[str, Any]) -> Reply:
        with self.lock:
            self.bodies.append(body)
            count = len(self.bodies)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            time.sleep(self.seconds)
            return self.misbehave(count, body) or self.samples(body)
        finally:
            with self.lock:
                self.running -= 1

    def samples(self, body: dict[str, Any]) -> Reply:
        if unknown := set(body) - FIELDS:
            return error(400, f"unknown fields {unknown}")
        choices = []
        for index in range(body.get("n", 1)):
            stops = tuple(body["stop_token_ids"])
            ids = drawn(body["seed"] + index, stops)[: body["max_tokens"]]
            finished = ids[-1] in stops
            choice = {
                "index": index,
                "text": "whatever",
                "finish_reason": "stop" if finished else "length",
                "token_ids": ids,
                "logprobs": {"token_logprobs": [-(i % 7) / 4 for i in ids]},
            }
            choices.insert(0, choice)  # in no order that could be relied on
        answer = {"choices": choices, "usage": {"prompt_tokens": len(body["prompt"])}}
        return 200, {}, json.dumps(answer).encode()


class Handler(BaseHTTPRequestHandler):
    server: CompletionServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        known = self.path == "/v1/models"
        models = {"data": [{"id": name} for name in self.server.models]}
        self.reply(200 if known else 404, {}, json.dumps(models if known else {}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.authorizations.append(self.headers["authorization"])
        if self.path != "/v1/completions":
            self.reply(*error(404, "Not Found"))
        else:
            self.reply(*self.server.complete(body))

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        try:
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection |= "content-length" in headers  # it lies about its length
        except OSError:
            self.close_connection = True  # nobody waits any more

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(*args: Any, **options: Any) -> Iterator[CompletionServer]:
    """A server for the length of a block."""
    server = CompletionServer(*args, **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def make_policy(folder: Path) -> Path:
    """A tiny policy of random weights, exported; it ends about one answer in three early."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from helpsteer2.data.chat import ChatFormat
    from helpsteer2.data.lengths import LengthLimits
    from helpsteer2.data.tokenizer import TrainedTokenizer
    from helpsteer2.models.policy_export import PolicySpec, write_policy

    tokenizer = TrainedTokenizer(300).build(
        lambda: iter(["What is the capital of France?", "Good morning to you!"]), folder / "cache"
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight[STOP] *= 3
    assert tokenizer.eos_token_id == STOP
    spec = PolicySpec(ChatFormat().bind(tokenizer), LengthLimits(100, 60), "random")
    write_policy(folder / "policy", model, spec, tokenizer)
    return folder / "policy"


if __name__ == "__main__":
    # A process that answers so many requests, and dies at the next one.
    answered = int(sys.argv[1])

    def die(count: int, body: dict[str, Any]) -> Reply | None:
        if count > answered:
            os._exit(1)
        return None

    dying = CompletionServer(die)
    print(dying.url, flush=True)
    dying.serve_forever()
