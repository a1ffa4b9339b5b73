"""What a row of the project's files holds beside texts and ratings: samples, scores, rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, TypeVar, cast, get_args

from helpsteer2.data.checks import RowCheck, shown
from helpsteer2.data.groups import FinishReason, Group, Message, Role
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.errors import UserError

LARGEST_ID = 2**31 - 1
"""Ids are stored as int32."""

LARGEST_NUMBER = 3.4e38
"""Scores and rewards are stored as float32."""

_Item = TypeVar("_Item")


class SampledColumns(TypedDict, total=False):
    """The optional columns of a ``Group`` that samplers and reward models fill."""

    response_ids: tuple[tuple[int, ...], ...]
    tokenizer: str
    finish_reasons: tuple[FinishReason, ...]
    logprobs: tuple[tuple[float, ...], ...]
    scores: tuple[tuple[float, ...], ...]
    score_names: tuple[str, ...]
    rewards: tuple[float, ...]


def is_sampled(check: RowCheck) -> bool:
    """Whether a row says that its responses were sampled, so that one may be empty."""
    values = check.row.values or {}
    return any(values.get(name) is not None for name in ("response_ids", "finish_reasons"))


def sampled_columns(check: RowCheck, n: int) -> SampledColumns:
    """Read the columns that samplers and reward models fill.

    Args:
        check: The row; every mistake in it is reported.
        n: Number of its responses.

    Returns:
        The columns that the row has; only of use if the row is in order.
    """
    columns: SampledColumns = {}
    if (response_ids := _per_response(check, "response_ids", n, _ids)) is not None:
        columns["response_ids"] = response_ids
    if (tokenizer := _tokenizer(check)) is not None:
        columns["tokenizer"] = tokenizer
    if (finish_reasons := _per_response(check, "finish_reasons", n, _finish_reason)) is not None:
        columns["finish_reasons"] = finish_reasons
    if (logprobs := _per_response(check, "logprobs", n, _logprobs)) is not None:
        columns["logprobs"] = logprobs
        _check_one_a_token(check, logprobs, response_ids)
    if (objects := _per_response(check, "scores", n, _object)) is not None:
        columns["score_names"] = names = tuple(objects[0]) if objects else ()
        columns["scores"] = tuple(
            _scores(check, f"scores[{i}]", item, names) for i, item in enumerate(objects)
        )
    if (rewards := _per_response(check, "rewards", n, _number)) is not None:
        columns["rewards"] = rewards
    return columns


def messages(check: RowCheck) -> tuple[Message, ...]:
    """The prompt's messages; the last one must be the user's, a system message only the first."""
    read: list[Message] = []
    for i, item in enumerate(items(check, "prompt", check.value("prompt"))):
        values = item if isinstance(item, dict) else {}
        role = values.get("role")
        if role not in get_args(Role) or (role == "system" and i > 0):
            check.fail(
                f"prompt[{i}].role",
                f"expected user or assistant (or system first), got {shown(role)}",
            )
            continue
        text = check.text_of(f"prompt[{i}].content", values.get("content"))
        message = Message(role=cast(Role, role), content=text or "")
        if (train := values.get("train")) is not None:
            message["train"] = _train(check, f"prompt[{i}].train", train, message["role"])
        read.append(message)
    if not read:
        check.fail("prompt", "expected at least one message")
    elif read[-1]["role"] != "user":
        check.fail(
            "prompt", f"must end in a turn of the user, it ends in one of the {read[-1]['role']}"
        )
    return tuple(read)


def label(check: RowCheck) -> AttributeLabel | None:
    """What the row asks its answer to be; None if it does not."""
    given = (check.row.values or {}).get("label")
    if given is None:
        return None
    if not isinstance(given, dict):
        check.fail("label", f"expected an object of ratings by attribute, got {shown(given)}")
        return None
    try:
        # Parquet has every attribute of the file in every row.
        return AttributeLabel.of({name: v for name, v in given.items() if v is not None})
    except UserError as error:
        check.fail("label", str(error))
        return None


def items(check: RowCheck, field: str, value: Any) -> list[Any]:
    """A list, empty after a report if it is none."""
    if isinstance(value, list):
        return value
    if value is not None:
        check.fail(field, f"expected a list, got {shown(value)}")
    return []


def group_row(group: Group, attribute_names: Sequence[str]) -> dict[str, Any]:
    """A group as a row of a file; what samplers and reward models fill is left out if unknown."""

    def objects(
        matrix: Sequence[Sequence[Any]] | None, names: Sequence[str]
    ) -> list[dict[str, Any]] | None:
        if matrix is None:
            return None
        return [dict(zip(names, cells, strict=True)) for cells in matrix]

    filled = {
        "response_ids": group.response_ids,
        "tokenizer": group.tokenizer,
        "finish_reasons": group.finish_reasons,
        "logprobs": group.logprobs,
        "scores": objects(group.scores, group.score_names or ()),
        "rewards": group.rewards,
        "label": None if group.label is None else group.label.as_dict(),
    }
    return {
        "id": group.id,
        "source": group.source,
        "prompt": list(group.prompt),
        "responses": list(group.responses),
        "attributes": objects(group.attributes, attribute_names),
        "annotations": objects(group.annotations, attribute_names),
        "preference_strength": group.preference_strength,
        **{name: value for name, value in filled.items() if value is not None},
    }


def parquet_schema(
    attribute_names: Sequence[str], score_names: Sequence[str], label_names: Sequence[str]
) -> Any:
    """Columns and types of a Parquet file of groups."""
    import pyarrow as pa

    def objects(names: Sequence[str], value: Any) -> Any:
        return pa.list_(pa.struct([(name, value) for name in names]))

    text = pa.string()
    message = pa.struct([("role", text), ("content", text), ("train", pa.bool_())])
    columns: list[tuple[str, Any]] = [
        ("id", text),
        ("source", text),
        ("prompt", pa.list_(message)),
        ("responses", pa.list_(text)),
        ("preference_strength", pa.int8()),
        ("response_ids", pa.list_(pa.list_(pa.int32()))),
        ("tokenizer", text),
        ("finish_reasons", pa.list_(text)),
        ("logprobs", pa.list_(pa.list_(pa.float64()))),
        ("rewards", pa.list_(pa.float64())),
    ]
    # Parquet knows no object without fields.
    if attribute_names:
        columns.append(("attributes", objects(attribute_names, pa.float64())))
        columns.append(("annotations", objects(attribute_names, pa.list_(pa.int8()))))
    if score_names:
        columns.append(("scores", objects(score_names, pa.float64())))
    if label_names:
        columns.append(("label", pa.struct([(name, pa.int8()) for name in label_names])))
    return pa.schema(columns)


def _per_response(
    check: RowCheck, column: str, n: int, take: Callable[[RowCheck, str, Any], _Item]
) -> tuple[_Item, ...] | None:
    """A column with one item a response; None if the row has none."""
    given = (check.row.values or {}).get(column)
    if given is None:
        return None
    values = items(check, column, given)
    if isinstance(given, list) and len(values) != n:
        check.fail(column, f"expected one item a response ({n}), got {len(values)}")
    return tuple(take(check, f"{column}[{i}]", value) for i, value in enumerate(values))


def _ids(check: RowCheck, field: str, value: Any) -> tuple[int, ...]:
    """The ids of one response."""
    ids = items(check, field, value)
    if not ids:
        check.fail(field, "expected at least one id: a finished response has its end-of-turn token")
    for j, token in enumerate(ids):
        if type(token) is not int or not 0 <= token <= LARGEST_ID:
            message = f"expected an id from 0 to {LARGEST_ID}, got {shown(token)}"
            check.fail(f"{field}[{j}]", message)
            break
    return tuple(ids)


def _logprobs(check: RowCheck, field: str, value: Any) -> tuple[float, ...]:
    """The log-probabilities of one response's ids."""
    values = items(check, field, value)
    for j, number in enumerate(values):
        if not (_is_number(number) and number <= 0):
            message = f"expected a finite log-probability of at most 0, got {shown(number)}"
            check.fail(f"{field}[{j}]", message)
            return tuple(values)
    return tuple(map(float, values))


def _check_one_a_token(
    check: RowCheck,
    logprobs: tuple[tuple[float, ...], ...],
    response_ids: tuple[tuple[int, ...], ...] | None,
) -> None:
    """Log-probabilities need the ids that they are of."""
    if response_ids is None:
        check.fail("logprobs", "there is one for each of the response_ids, and the row has none")
        return
    for i, (numbers, ids) in enumerate(zip(logprobs, response_ids, strict=False)):
        if len(numbers) != len(ids):
            message = f"expected one number for each of the {len(ids)} ids, got {len(numbers)}"
            check.fail(f"logprobs[{i}]", message)


def _tokenizer(check: RowCheck) -> str | None:
    """Which tokenizer and template the ids belong to."""
    values = check.row.values or {}
    given = values.get("tokenizer")
    if (given is None) != (values.get("response_ids") is None):
        check.fail("tokenizer", "must be there if and only if response_ids are: it says whose")
    return None if given is None else check.text_of("tokenizer", given)


def _finish_reason(check: RowCheck, field: str, value: Any) -> FinishReason:
    if value not in get_args(FinishReason):
        check.fail(field, f"expected stop or length, got {shown(value)}")
    return cast(FinishReason, value)


def _object(check: RowCheck, field: str, value: Any) -> dict[str, Any]:
    """The scores of one response."""
    if not isinstance(value, dict) or not value:
        check.fail(field, f"expected an object of scores, got {shown(value)}")
        return {}
    return value


def _scores(
    check: RowCheck, field: str, scores: dict[str, Any], names: tuple[str, ...]
) -> tuple[float, ...]:
    """The scores of one response in the order of the first response's."""
    if scores and scores.keys() != set(names):
        message = f"expected the scores of the first response ({', '.join(names)})"
        check.fail(field, f"{message}, got {', '.join(scores)}")
    return tuple(
        _number(check, f"{field}.{name}", scores[name]) for name in names if name in scores
    )


def _number(check: RowCheck, field: str, value: Any) -> float:
    if not _is_number(value):
        check.fail(field, f"expected a finite number, got {shown(value)}")
        return 0.0
    return float(value)


def _is_number(value: Any) -> bool:
    """Whether a value is a number that float32 can hold; false for NaN."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -LARGEST_NUMBER <= value <= LARGEST_NUMBER


def _train(check: RowCheck, field: str, value: Any, role: Role) -> bool:
    """Whether an answer inside the prompt is learned."""
    if not isinstance(value, bool):
        check.fail(field, f"expected true or false, got {shown(value)}")
    elif role != "assistant":
        check.fail(field, f"only a message of the assistant has it, this is one of the {role}")
    return bool(value)
