"""What each kind of OpenAI-compatible server takes beyond the common fields, and gives back.

Written after vLLM's and SGLang's ``entrypoints/openai`` protocols (2026) and the
``/v1/completions`` of ``transformers serve`` 5.23.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from helpsteer2.data.groups import FinishReason
from helpsteer2.errors import UserError
from helpsteer2.generation.sampling import SamplingParams

ServerName = Literal["vllm", "sglang", "transformers", "openai"]

Fields = Callable[[SamplingParams, Sequence[int]], dict[str, Any]]
"""Sampling settings and the tokens that end a response, to the fields of a request."""


@dataclass(frozen=True)
class ServerKind:
    """One kind of server.

    Attributes:
        ids: Whether prompts may be token ids and the sampled ids come back; text both ways if not.
        top_k: Whether it can draw from the k likeliest tokens alone.
        several: Whether one request may ask for n samples and draws sample i with seed + i.
        lists_models: Whether the models it lists are those it serves.
        raw_logprobs: Whether log-probs are the model's own at every temperature, not at 1 alone.
        fields: What a request holds beyond the common fields.
        start: A command that starts one.
    """

    ids: bool
    top_k: bool
    several: bool
    lists_models: bool
    raw_logprobs: bool
    fields: Fields
    start: str

    def check(self, params: SamplingParams) -> None:
        """Refuse what the server cannot do, or could not be told apart in its answers.

        Args:
            params: How to draw.

        Raises:
            UserError: With what it cannot.
        """
        lacking = {
            "sampling.top_k": params.top_k and not self.top_k,
            # Text does not tell which token ended it.
            "sampling.stop_token_ids": params.stop_token_ids and not self.ids,
        }
        named = " nor ".join(name for name, lacks in lacking.items() if lacks)
        if named:
            capable = ", ".join(name for name, kind in SERVERS.items() if kind.ids)
            raise UserError(
                f"this kind of server takes no {named}: leave it out, or use one of {capable}"
            )


def _vllm(params: SamplingParams, stop_ids: Sequence[int]) -> dict[str, Any]:
    # What is left out would come from the model's generation_config.json.
    return {
        "top_k": params.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,  # what ends a response is ours to say, with the ids that follow
        "stop_token_ids": list(stop_ids),
        "return_token_ids": True,
        "logprobs": 0,
    }


def _sglang(params: SamplingParams, stop_ids: Sequence[int]) -> dict[str, Any]:
    # Its ignore_eos would ignore stop_token_ids as well.
    return {
        "top_k": params.top_k or -1,
        "stop_token_ids": list(stop_ids),
        "return_token_ids": True,
        "logprobs": 1,
    }


def _transformers(params: SamplingParams, stop_ids: Sequence[int]) -> dict[str, Any]:
    # Without this the model's generation_config.json decides, by default for greedy decoding
    # whatever the temperature.
    config: dict[str, Any] = {
        "do_sample": params.temperature > 0,
        "eos_token_id": list(stop_ids),
        "max_new_tokens": params.max_tokens,
        "num_beams": 1,
        "pad_token_id": stop_ids[0],
        "repetition_penalty": 1.0,
    }
    if params.temperature > 0:
        config["top_k"] = params.top_k
    return {"generation_config": json.dumps(config)}


def _openai(params: SamplingParams, stop_ids: Sequence[int]) -> dict[str, Any]:
    return {}


SERVERS: dict[ServerName, ServerKind] = {
    "vllm": ServerKind(
        ids=True,
        top_k=True,
        several=True,
        lists_models=True,
        raw_logprobs=True,
        fields=_vllm,
        start="vllm serve MODEL --port 8000",
    ),
    "sglang": ServerKind(
        ids=True,
        top_k=True,
        several=False,  # one seed would give n times the same
        lists_models=True,
        raw_logprobs=False,
        fields=_sglang,
        start="python -m sglang.launch_server --model-path MODEL --port 8000",
    ),
    "transformers": ServerKind(
        ids=False,
        top_k=True,
        several=False,
        lists_models=False,  # but what the cache of the Hub holds
        raw_logprobs=False,
        fields=_transformers,
        start="transformers serve MODEL --port 8000",
    ),
    "openai": ServerKind(
        ids=False,
        top_k=False,
        several=False,
        lists_models=True,
        raw_logprobs=False,
        fields=_openai,
        start="see its manual",
    ),
}


def request_body(
    kind: ServerKind,
    model: str | None,
    prompt: str | Sequence[int],
    params: SamplingParams,
    seed: int,
    n: int,
    stop_ids: Sequence[int],
) -> dict[str, Any]:
    """A request for samples of one prompt.

    Args:
        kind: The kind of server.
        model: Name of the model there, None for the only one.
        prompt: Text, or token ids if the server takes them.
        params: How to draw.
        seed: Seed of the first of the samples.
        n: How many samples, 1 unless the server gives several.
        stop_ids: Every token that ends a response.

    Returns:
        The JSON object.
    """
    body: dict[str, Any] = {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": seed,
        **kind.fields(params, stop_ids),
    }
    if model is not None:
        body["model"] = model
    if n > 1:
        body["n"] = n
    return body


@dataclass(frozen=True)
class Choice:
    """One completion as the server gave it.

    Attributes:
        text: Its text, without the token that ended it.
        finish_reason: ``stop`` or ``length``.
        ids: Its token ids, None if the server tells none.
        logprobs: Nats, one a token of ``ids``; None if the server tells none.
    """

    text: str
    finish_reason: FinishReason
    ids: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        choices: The completions, in their order.
        prompt_tokens: Tokens of the prompt as the server counted them, None if it does not tell.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int | None


def read_answer(content: dict[str, Any], n: int) -> Answer:
    """Check an answer and take what is needed.

    Args:
        content: The JSON object.
        n: Completions asked for.

    Raises:
        UserError: If it is not what the protocol says.
    """
    choices = content.get("choices")
    if not isinstance(choices, list) or len(choices) != n:
        got = f"{len(choices)}" if isinstance(choices, list) else "no list"
        raise UserError(f"the server answered {got} of {n} `choices`")
    if not all(isinstance(choice, dict) for choice in choices):
        raise UserError("the server answered `choices` that are no objects")
    usage = content.get("usage")
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if all(type(choice.get("index")) is int for choice in choices):
        choices = sorted(choices, key=lambda choice: choice["index"])
    return Answer(tuple(map(_choice, choices)), counted if isinstance(counted, int) else None)


def _choice(choice: dict[str, Any]) -> Choice:
    text, reason = choice.get("text"), choice.get("finish_reason")
    if not isinstance(text, str):
        raise UserError("the server answered a choice without `text`")
    # JSON can spell half a character, which no file could hold.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if reason != "stop" and reason != "length":
        raise UserError(f"the server ended a completion with finish_reason={reason!r}")
    ids = choice.get("token_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        raise UserError("the server answered `token_ids` that are no list of integers")
    logprobs = _logprobs(choice.get("logprobs"))
    if logprobs is not None and (ids is None or len(logprobs) != len(ids)):
        logprobs = None  # nobody could say of which tokens
    return Choice(text, reason, None if ids is None else tuple(ids), logprobs)


def _logprobs(value: Any) -> tuple[float, ...] | None:
    values = value.get("token_logprobs") if isinstance(value, dict) else None
    if not isinstance(values, list):
        return None
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        return None
    return tuple(min(float(value), 0.0) for value in values)  # rounding may put them above 0
