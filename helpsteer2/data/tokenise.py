"""From groups to ids on disk: tokenised once, cached, and read back as memory maps."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from helpsteer2.data.boundary import boundary_difference
from helpsteer2.data.chat import BoundChat
from helpsteer2.data.group_encoder import GroupEncoder
from helpsteer2.data.groups import Group, GroupSource, read_all
from helpsteer2.data.lengths import CutReport, LengthLimits
from helpsteer2.data.rows import problem_at
from helpsteer2.data.token_store import TokenisedGroups, TokenWriter, open_store
from helpsteer2.data.tokenizer import tokenizer_hash
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.errors import DataError, Problem, UserError
from helpsteer2.records import reason

logger = logging.getLogger(__name__)

FORMAT_VERSION = 5
"""Raised whenever the same input would be stored as something else."""

CHUNK = 256
"""Groups in one call of the tokenizer."""

COMPARED = 64
"""Groups whose ids are compared with those of whole conversations."""


def encode_group(
    group: Group,
    index: int,
    chat: BoundChat,
    limits: LengthLimits,
    attribute_names_of_source: Sequence[str],
    attribute_names_wanted: Sequence[str],
    report: CutReport,
    close_cut: bool = True,
) -> TokenGroup:
    """Encode one group, to the same ids as ``tokenise``.

    Args:
        group: The group.
        index: Its position in its data set.
        chat: Template and tokenizer.
        limits: Longest prompt and response.
        attribute_names_of_source: Names of the columns of ``group.attributes``.
        attribute_names_wanted: The A names wanted; NaN where the source has no such column.
        report: Counts what the limits cut.
        close_cut: As for ``tokenise``.

    Returns:
        Ids and ratings.

    Raises:
        UserError: If a response is empty and was not sampled, or the template or the limits refuse
            the group.
    """
    columns = _columns(attribute_names_of_source, attribute_names_wanted)
    encoder = GroupEncoder(chat, limits, columns, not close_cut, report)
    (encoded,) = encoder.encode([group], index)
    if isinstance(encoded, UserError):
        raise encoded
    return encoded


def tokenise(
    source: GroupSource,
    split: str,
    chat: BoundChat,
    limits: LengthLimits,
    attribute_names: Sequence[str],
    cache_dir: str | Path,
    close_cut: bool = True,
) -> TokenisedGroups:
    """Encode a split, or reopen it if the same was encoded before.

    Memory does not grow with the number of groups. Several processes may ask for the same at once:
    one works, the others wait for it.

    Args:
        source: Where to read.
        split: ``train``, ``validation``, …
        chat: Template and tokenizer.
        limits: Longest prompt and response.
        attribute_names: The A attributes wanted; those that the source lacks become NaN.
        cache_dir: Folder for tokenised data.
        close_cut: Whether every response is closed, cut or not, and encoded from its text, as a
            reward model reads it. A policy learns otherwise: a response that is cut or that its
            sampler left unfinished is not closed, and sampled ids of this chat stay as they are.

    Returns:
        The groups as memory maps. Their report has the counts of ``CutReport`` and
        ``EncodingReport``.

    Raises:
        DataError: If rows are bad, or responses empty that were not sampled; lists all of them.
        UserError: If the limits are too small for the template, or the cache cannot be written.
    """
    from filelock import FileLock

    limits.check(chat)
    key = _cache_key(source, split, chat, limits, attribute_names, close_cut)
    folder = Path(cache_dir).expanduser() / "tokenised" / key
    groups = open_store(folder, key)
    if groups is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                groups = open_store(folder, key)  # another process may have been faster
                if groups is None:
                    _write(folder, key, source, split, chat, limits, attribute_names, close_cut)
                    groups = open_store(folder, key)
        except OSError as error:
            raise UserError(
                f"cannot write tokenised data to {folder.parent}: {reason(error)}"
            ) from error
    if groups is None:
        raise UserError(f"tokenised data cannot be read back from {folder}: is the disk in order?")
    _log_cuts(split, groups.report, limits)
    _log_boundary(split, groups.report, chat)
    _log_encoding(split, groups.report, chat)
    return groups


def _write(
    folder: Path,
    key: str,
    source: GroupSource,
    split: str,
    chat: BoundChat,
    limits: LengthLimits,
    attribute_names: Sequence[str],
    close_cut: bool,
) -> None:
    """Encode everything into a folder aside and move it into place."""
    aside = folder.with_suffix(".partial")
    for leftover in (aside, folder):  # of a killed process, or damaged
        shutil.rmtree(leftover, ignore_errors=True)
    columns = _columns(source.attribute_names, attribute_names)
    encoder = GroupEncoder(chat, limits, columns, not close_cut)
    problems: list[Problem] = []
    compared: list[Group] = []
    index = 0
    try:
        with (
            TokenWriter(aside, attribute_names) as writer,
            _progress(f"tokenising {split}") as advance,
        ):
            for chunk in _chunks(_readable(source, split, problems)):
                for group, encoded in zip(chunk, encoder.encode(chunk, index), strict=True):
                    if isinstance(encoded, UserError):
                        problems.append(problem_at(group.source, str(encoded)))
                    else:
                        writer.add(encoded, group.id)
                index += len(chunk)
                compared += map(encoder.as_read, chunk[: COMPARED - len(compared)])
                advance(len(chunk))
            if problems:
                raise DataError(problems)
            # One by one: as a share of all, those that cannot be written as text would not count.
            differing = sum(boundary_difference(chat, [group]) > 0 for group in compared)
            boundary = {"boundaries_compared": len(compared), "boundaries_differing": differing}
            counts = {**encoder.cuts.counts(), **encoder.report.counts()}
            writer.finish(key, {**counts, **boundary}, encoder.label_attributes)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _readable(source: GroupSource, split: str, problems: list[Problem]) -> Iterator[Group]:
    """Read a split; its bad rows join the problems, so that all are reported together."""
    try:
        yield from read_all(source, split)
    except DataError as error:
        problems[:0] = error.problems
    except OSError as error:
        raise UserError(f"cannot read {split!r}: {error}") from error


def _columns(names_of_source: Sequence[str], names_wanted: Sequence[str]) -> list[int | None]:
    """Column of the source for each wanted name, None if it has none."""
    positions = {name: i for i, name in enumerate(names_of_source)}
    return [positions.get(name) for name in names_wanted]


def _cache_key(
    source: GroupSource,
    split: str,
    chat: BoundChat,
    limits: LengthLimits,
    attribute_names: Sequence[str],
    close_cut: bool,
) -> str:
    """Hash of everything that decides what is stored."""
    parts: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "source": source.fingerprint(split),
        "source_attributes": list(source.attribute_names),
        "split": split,
        "tokenizer": tokenizer_hash(chat.tokenizer),
        "template": chat.template_hash,
        "system_prompt": chat.system_prompt,
        "label_form": chat.labels.form,
        "limits": [limits.max_prompt_tokens, limits.max_response_tokens],
        "attributes": list(attribute_names),
        "close_cut": close_cut,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _chunks(groups: Iterable[Group]) -> Iterator[list[Group]]:
    """Lists of up to ``CHUNK`` groups."""
    iterator = iter(groups)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _log_cuts(split: str, report: dict[str, int], limits: LengthLimits) -> None:
    """Say what the limits cut, if anything."""
    if report["tokens_cut"]:
        logger.warning(
            "%s: cut %d of %d prompts (%d turns dropped) to %d tokens and %d of %d responses to "
            "%d; %d tokens lost",
            *(split, report["prompts_cut"], report["groups"], report["turns_dropped"]),
            *(limits.max_prompt_tokens, report["responses_cut"], report["responses"]),
            *(limits.max_response_tokens, report["tokens_cut"]),
        )


def _log_boundary(split: str, report: dict[str, int], chat: BoundChat) -> None:
    """Say how often the ids are not those of the whole conversation as one text, if ever."""
    if report["boundaries_differing"]:
        logger.info(
            "%s: in %d of the first %d groups the ids differ from those of prompt and response as "
            "one text: chat template %r has no special token between them",
            *(split, report["boundaries_differing"], report["boundaries_compared"]),
            chat.template_name,
        )


def _log_encoding(split: str, report: dict[str, int], chat: BoundChat) -> None:
    """Say which sampled ids and marked answers could not be used, if any."""
    if report["responses_of_other_ids"]:
        logger.warning(
            "%s: the sampled ids of %d of %d responses belong to another tokenizer or template: "
            "their texts were encoded anew, which may give other tokens than those sampled",
            *(split, report["responses_of_other_ids"], report["responses"]),
        )
    if report["turns_not_trained"]:
        logger.warning(
            "%s: %d of %d answers marked for training inside prompts are not learned: chat "
            "template %r writes them otherwise there than as a response; to learn them, make each "
            "the response of a group of its own",
            *(split, report["turns_not_trained"]),
            *(report["turns_not_trained"] + report["turns_trained"], chat.template_name),
        )


@contextmanager
def _progress(label: str) -> Iterator[Any]:
    """A counter on standard error, if that is a terminal; yields what advances it."""
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}: {task.completed:,.0f} groups")
    columns = (SpinnerColumn(), text, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda n: bar.advance(task, n)
