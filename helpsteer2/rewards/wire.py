"""The format of scoring over HTTP: a body of JSON becomes groups, or a refusal that says why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from helpsteer2.data.checks import shown
from helpsteer2.data.groups import FinishReason, Group, Message, Role

MAX_PROBLEMS = 20
"""A request that has more is not looked at further: its answer stays short."""

_TEXT = {"type": "string"}
_FINISH = {"enum": list(get_args(FinishReason))}
_GROUP = {
    "type": "object",
    "required": ["prompt", "responses"],
    "additionalProperties": False,
    "properties": {
        "prompt": {
            "type": "array",
            "minItems": 1,
            "description": "Chat messages: a system message may be the first, the user's is last.",
            "items": {
                "type": "object",
                "required": ["role", "content"],
                "additionalProperties": False,
                "properties": {"role": {"enum": list(get_args(Role))}, "content": _TEXT},
            },
        },
        "responses": {"type": "array", "minItems": 1, "items": _TEXT},
        "finish_reasons": {
            "type": "array",
            "items": _FINISH,
            "description": "Of sampled responses, one each: only these may be empty texts.",
        },
    },
}
REQUEST_SCHEMA = {
    "type": "object",
    "required": ["groups"],
    "additionalProperties": False,
    "properties": {"groups": {"type": "array", "minItems": 1, "items": _GROUP}},
}
"""JSON schema of the body of ``POST /score``."""


@dataclass(frozen=True)
class RequestLimits:
    """What one request may hold.

    Args:
        max_body_bytes: Bytes of its body.
        max_rows: Responses of all its groups.
        max_characters: Characters of one message or response.
        max_messages: Messages of all its prompts; to cut a prompt takes a rendering a message.
    """

    max_body_bytes: int = 8 << 20
    max_rows: int = 1024
    max_characters: int = 1_000_000
    max_messages: int = 1024


class Refusal(Exception):
    """A request that is not answered by scores.

    Args:
        status: Status code of HTTP.
        message: What is wrong.
        problems: Every place that is wrong; no content of the request beyond a few characters.
    """

    def __init__(self, status: int, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.problems = status, message, list(problems)


def parse_request(body: bytes, limits: RequestLimits) -> list[Group]:
    """Read the body of ``POST /score``.

    Args:
        body: The bytes, not more than allowed.
        limits: What it may hold.

    Returns:
        At least one group, each with at least one response.

    Raises:
        Refusal: 400 if it is no JSON, 422 with every problem if it is not of the schema, 413 if it
            holds too much.
    """
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not valid UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not valid JSON: {str(error)[:120]}") from error
    _check_size(content, limits)
    check = _Check()
    groups = check.groups(content)
    if check.problems:
        raise Refusal(422, "the body is not what /score takes", check.problems)
    longest = max(len(text) for group in groups for text in _texts(group))
    if longest > limits.max_characters:
        limit = f"at most {limits.max_characters:,}"
        raise Refusal(413, f"a text of {longest:,} characters in the request, {limit}")
    return groups


def _check_size(content: Any, limits: RequestLimits) -> None:
    """Refuse too many responses or messages before anything is made of them."""
    groups = content.get("groups") if isinstance(content, dict) else None
    rows = [row for row in groups if isinstance(row, dict)] if isinstance(groups, list) else []
    kinds = (
        ("responses", "responses", limits.max_rows),
        ("prompt", "messages", limits.max_messages),
    )
    for key, name, most in kinds:
        count = sum(len(row[key]) for row in rows if isinstance(row.get(key), list))
        if count > most:
            raise Refusal(413, f"{count:,} {name} in one request, at most {most:,}")


def _texts(group: Group) -> Iterator[str]:
    yield from (message["content"] for message in group.prompt)
    yield from group.responses


def request_body(groups: Sequence[Group]) -> bytes:
    """Write groups as the body of ``POST /score``.

    Args:
        groups: At least one.
    """
    return json.dumps({"groups": [_as_json(group) for group in groups]}).encode()


def _as_json(group: Group) -> dict[str, Any]:
    prompt = [{"role": m["role"], "content": m["content"]} for m in group.prompt]
    row: dict[str, Any] = {"prompt": prompt, "responses": list(group.responses)}
    if group.sampled:
        row["finish_reasons"] = list(group.finish_reasons or ["stop"] * len(group.responses))
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


class _TooManyProblems(Exception):
    """Nobody reads more of them."""


class _Check:
    """Turns JSON into groups and collects whatever is wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def groups(self, content: Any) -> list[Group]:
        try:
            body = self._object("body", content, ("groups",))
            items = [] if body is None else self._list("groups", body.get("groups"))
            return [self._group(f"groups[{i}]", item) for i, item in enumerate(items)]
        except _TooManyProblems:
            return []

    def _group(self, place: str, content: Any) -> Group:
        row = self._object(place, content, ("prompt", "responses", "finish_reasons"))
        if row is None:
            return Group(place, "request", (), ())
        messages = self._list(f"{place}.prompt", row.get("prompt"))
        prompt = [self._message(f"{place}.prompt[{i}]", item, i) for i, item in enumerate(messages)]
        if prompt and prompt[-1]["role"] != "user":
            self._fail(f"{place}.prompt", "has to end in a message of the user")
        items = self._list(f"{place}.responses", row.get("responses"))
        responses = [self._text(f"{place}.responses[{i}]", text) for i, text in enumerate(items)]
        reasons = None
        if row.get("finish_reasons") is not None:
            reasons = self._list(f"{place}.finish_reasons", row["finish_reasons"])
            for i, reason in enumerate(reasons):
                if reason not in _FINISH["enum"]:
                    wanted = f"expected stop or length, got {shown(reason)}"
                    self._fail(f"{place}.finish_reasons[{i}]", wanted)
            if len(reasons) != len(responses):
                self._fail(f"{place}.finish_reasons", "has to be as long as responses")
        return Group(
            id=place,
            source="request",
            prompt=tuple(prompt),
            responses=tuple(responses),
            finish_reasons=None if reasons is None else tuple(reasons),
        )

    def _message(self, place: str, content: Any, index: int) -> Message:
        row = self._object(place, content, ("role", "content"))
        if row is None:
            return Message(role="user", content="")
        role: Any = row.get("role")
        if role not in get_args(Role) or (role == "system" and index > 0):
            wanted = "expected user or assistant (or system first)"
            self._fail(f"{place}.role", f"{wanted}, got {shown(role)}")
            role = "user"
        return Message(role=role, content=self._text(f"{place}.content", row.get("content")))

    def _text(self, place: str, value: Any) -> str:
        if not isinstance(value, str):
            self._fail(place, _wanted("a text", value))
            return ""
        return value

    def _list(self, place: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or not value:
            self._fail(place, "is an empty list" if value == [] else _wanted("a list", value))
            return []
        return value

    def _object(self, place: str, value: Any, keys: Sequence[str]) -> dict[str, Any] | None:
        if not isinstance(value, dict):
            self._fail(place, _wanted("an object", value))
            return None
        for name in sorted(value.keys() - set(keys)):
            self._fail(place, f"has an unknown key {name[:40]!r}")
        return value

    def _fail(self, place: str, message: str) -> None:
        self.problems.append(f"{place}: {message}")
        if len(self.problems) == MAX_PROBLEMS:
            raise _TooManyProblems


def _wanted(what: str, value: Any) -> str:
    return "is missing" if value is None else f"expected {what}, got {shown(value)}"
