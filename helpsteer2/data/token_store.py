"""Token groups on disk: flat columns as ``.npy`` memory maps, and a ``meta.json`` with checksums.

Tokens lie group after group: the prompt, then its responses. ``segments`` holds where each of them
starts and ``first_segments`` the first segment of each group, so that response r of group g is
segment ``first_segments[g] + 1 + r`` and row ``first_segments[g] - g + r`` of the ratings and of
the rewards. ``trained`` marks, token for token, what supervised fine-tuning learns of the prompts.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from helpsteer2.data.overlap import GroupHashes
from helpsteer2.data.strings import Strings
from helpsteer2.data.tokens import TokenGroup

_DTYPES: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<i4"),
    "trained": np.dtype("u1"),
    "segments": np.dtype("<i8"),
    "first_segments": np.dtype("<i8"),
    "lengths": np.dtype("<i8"),
    "ratings": np.dtype("<f4"),
    "preference_strength": np.dtype("<f4"),
    "rewards": np.dtype("<f4"),
    "ids": np.dtype("u1"),
    "id_starts": np.dtype("<i8"),
}
_IDS = ("tokens", "segments", "first_segments")
_HEADER_BYTES = 128


class TokenisedGroups:
    """Groups as ids, memory-mapped: opening them costs no memory that grows with their number.

    Args:
        folder: A folder written by ``TokenWriter``.
        meta: Its ``meta.json``.

    Attributes:
        attribute_names: The A names of the columns of the ratings.
        fingerprint: Hash of everything that decided the contents.
        ids_hash: Hash of the ids alone and of what they make up: the same for groups that differ in
            nothing but ratings, rewards and names.
        label_attributes: What the labels behind the prompts are of; none without any label.
        report: Counts: groups, responses, tokens, what the length limits cut, and what a selection
            left out.
        lengths: ``(G,)`` int64, tokens of each group (prompt once, every response once).
        ids: The G ids of the groups.
    """

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.attribute_names: tuple[str, ...] = tuple(meta["attribute_names"])
        self.fingerprint: str = meta["fingerprint"]
        self.ids_hash: str = meta["ids_hash"]
        self.label_attributes: tuple[str, ...] = tuple(meta["label_attributes"])
        self.report: dict[str, int] = meta["report"]
        columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _DTYPES}
        self.lengths: npt.NDArray[np.int64] = columns["lengths"]
        starts = columns["id_starts"]
        self.ids = Strings(columns["ids"], starts[:-1], starts[1:])
        self._tokens = columns["tokens"]
        self._segments = columns["segments"]
        self._first_segments = columns["first_segments"]
        self._ratings = columns["ratings"]
        self._strength = columns["preference_strength"]
        self._rewards = columns["rewards"]
        self._trained = columns["trained"]
        self._ref_logprobs: npt.NDArray[np.float32] | None = None
        self._members: range | npt.NDArray[np.int64] = range(len(self.lengths))

    def select(
        self, positions: npt.NDArray[np.int64], counts: Mapping[str, int]
    ) -> TokenisedGroups:
        """Some of the groups, over the same files; each keeps its ``index`` in the data set.

        Args:
            positions: ``(S,)`` which ones.
            counts: What was left out and why, for the report.

        Returns:
            The S groups.
        """
        selected = copy.copy(self)
        selected.report = {**self.report, **counts}
        selected.lengths = self.lengths[positions]
        selected.ids = self.ids.select(positions)
        selected._members = self.indices[positions]
        return selected

    def with_ref_logprobs(self, sums: npt.NDArray[np.float32]) -> TokenisedGroups:
        """The same groups, each with what a reference policy gives its responses.

        Args:
            sums: ``(R,)`` float32 nats, one a response: those of the first group, of the second, …

        Raises:
            ValueError: If there is not one number a response.
        """
        owners, within = self._responses()
        if sums.shape != owners.shape:
            raise ValueError(f"expected {len(owners)} log-probs, one a response, got {sums.shape}")
        joined = copy.copy(self)
        joined._ref_logprobs = np.full(len(self._rewards), np.nan, np.float32)
        joined._ref_logprobs[self._first_segments[owners] - owners + within] = sums
        return joined

    @property
    def preference_strength(self) -> npt.NDArray[np.float32]:
        """``(G,)`` float32, −3 … 3, NaN where unknown."""
        return np.asarray(self._strength[self._members])

    @property
    def indices(self) -> npt.NDArray[np.int64]:
        """``(G,)`` int64, position of each group in its data set."""
        return np.asarray(self._members, dtype=np.int64)

    @property
    def n_responses(self) -> npt.NDArray[np.int64]:
        """``(G,)`` int64, responses of each group."""
        return self._all_n_responses()[self._members]

    @property
    def response_lengths(self) -> npt.NDArray[np.int64]:
        """``(R,)`` int64, tokens of each response, group after group."""
        owners, within = self._responses()
        segments = self._first_segments[owners] + 1 + within
        return np.asarray(self._segments[segments + 1] - self._segments[segments])

    @property
    def rewards(self) -> npt.NDArray[np.float32]:
        """``(R,)`` float32, reward of each response, NaN where unknown."""
        owners, within = self._responses()
        return np.asarray(self._rewards[self._first_segments[owners] - owners + within])

    @property
    def ref_logprobs(self) -> npt.NDArray[np.float32]:
        """``(R,)`` float32 nats, what the reference gives each response, NaN where unknown."""
        owners, within = self._responses()
        if self._ref_logprobs is None:
            return np.full(len(owners), np.nan, np.float32)
        return np.asarray(self._ref_logprobs[self._first_segments[owners] - owners + within])

    def _responses(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Stored group and number within it, ``(R,)`` each, of the responses of these groups."""
        n_responses = self.n_responses
        owners = np.repeat(self.indices, n_responses)
        before = np.repeat(n_responses.cumsum() - n_responses, n_responses)
        return owners, np.arange(len(owners)) - before

    def _all_n_responses(self) -> npt.NDArray[np.int64]:
        """Responses of every stored group, selected or not; a group has a prompt besides."""
        return np.asarray(np.diff(self._first_segments) - 1)

    def __len__(self) -> int:
        """Number of groups, G."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenGroup:
        """The group at a position, as copies in memory."""
        i = int(self._members[index])
        first, end = (int(s) for s in self._first_segments[i : i + 2])
        borders = self._segments[first : end + 1]
        parts = [np.array(self._tokens[a:b]) for a, b in pairwise(borders)]
        rows = slice(first - i, end - i - 1)
        trained = np.array(self._trained[borders[0] : borders[1]], dtype=bool)
        return TokenGroup(
            prompt_ids=parts[0],
            response_ids=tuple(parts[1:]),
            attributes=np.array(self._ratings[rows]),
            preference_strength=float(self._strength[i]),
            index=i,
            rewards=np.array(self._rewards[rows]),
            ref_logprobs=None if self._ref_logprobs is None else self._ref_logprobs[rows].copy(),
            prompt_mask=trained if trained.any() else None,
        )

    def hashes(self) -> GroupHashes:
        """What tells each group by its ids, so as a model reads it: cut to the limits."""
        hashes = GroupHashes()
        # Slicing a memory map as such takes longer than hashing what it gives.
        tokens, segments = np.asarray(self._tokens), np.asarray(self._segments)
        first_segments = np.asarray(self._first_segments)
        for i in self._members:
            first, end = first_segments[i : i + 2]
            borders = pairwise(segments[first : end + 1].tolist())
            prompt, *responses = (tokens[a:b].tobytes() for a, b in borders)
            hashes.add(prompt, responses)
        return hashes

    def rating_means(self) -> npt.NDArray[np.float64]:
        """Mean of the known ratings of each attribute, ``(A,)``; NaN where none is known."""
        return self._moments()[0]

    def rating_stds(self) -> npt.NDArray[np.float64]:
        """Population standard deviation of the known ratings, ``(A,)``; NaN where none is known."""
        return self._moments()[1]

    def _moments(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Mean and standard deviation over known ratings, in two passes."""
        is_member = np.zeros(len(self._strength), dtype=bool)
        is_member[self._members] = True
        ratings = self._ratings[np.repeat(is_member, self._all_n_responses())].astype(np.float64)
        known = ~np.isnan(ratings)
        with np.errstate(invalid="ignore"):
            means = np.where(known, ratings, 0.0).sum(axis=0) / known.sum(axis=0)
            squares = np.where(known, (ratings - means) ** 2, 0.0).sum(axis=0) / known.sum(axis=0)
        return means, np.sqrt(squares)


def open_store(folder: Path, fingerprint: str) -> TokenisedGroups | None:
    """Open a folder of token groups.

    Args:
        folder: Where it should be.
        fingerprint: What it should hold.

    Returns:
        The groups; None if the folder is missing, incomplete, damaged or holds something else.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["fingerprint"] != fingerprint:
            return None
        if any(meta["checksums"][name] != _checksum(folder / f"{name}.npy") for name in _DTYPES):
            return None
        return TokenisedGroups(folder, meta)
    except (OSError, ValueError, KeyError, TypeError):
        return None


class TokenWriter:
    """Write token groups one after the other; nothing but the last group is held in memory.

    Args:
        folder: A folder to create.
        attribute_names: Names of the A rating columns.
    """

    def __init__(self, folder: Path, attribute_names: Sequence[str]) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._attribute_names = tuple(attribute_names)
        self._columns = {
            name: _Column(folder / f"{name}.npy", dtype, self._width(name))
            for name, dtype in _DTYPES.items()
        }
        self._counts = {"groups": 0, "responses": 0, "tokens": 0, "prompt_tokens_trained": 0}
        for name in ("segments", "first_segments", "id_starts"):
            self._columns[name].add([0])

    def __enter__(self) -> TokenWriter:
        """Start writing."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files."""
        for column in self._columns.values():
            column.file.close()

    def add(self, group: TokenGroup, group_id: str) -> None:
        """Append a group."""
        columns, counts = self._columns, self._counts
        parts = (group.prompt_ids, *group.response_ids)
        trained = np.zeros(group.n_tokens, dtype=bool)
        if group.prompt_mask is not None:
            trained[: len(group.prompt_ids)] = group.prompt_mask
        n_responses = len(group.response_ids)
        unknown = np.full(n_responses, np.nan)
        columns["tokens"].add(np.concatenate(parts))
        columns["trained"].add(trained)
        columns["segments"].add(counts["tokens"] + np.cumsum([len(part) for part in parts]))
        counts["groups"] += 1
        counts["responses"] += n_responses
        counts["tokens"] += group.n_tokens
        counts["prompt_tokens_trained"] += int(trained.sum())
        columns["first_segments"].add([counts["groups"] + counts["responses"]])
        columns["lengths"].add([group.n_tokens])
        columns["ratings"].add(group.attributes)
        columns["rewards"].add(unknown if group.rewards is None else group.rewards)
        columns["preference_strength"].add([group.preference_strength])
        columns["ids"].add(np.frombuffer(group_id.encode("utf-8"), dtype=np.uint8))
        columns["id_starts"].add([columns["ids"].rows])

    def _width(self, name: str) -> int | None:
        """Columns of a two-dimensional array, None for a flat one."""
        return len(self._attribute_names) if name == "ratings" else None

    def finish(
        self, fingerprint: str, report: dict[str, int], label_attributes: Sequence[str] = ()
    ) -> None:
        """Complete the files and sync them to disk.

        Args:
            fingerprint: Hash of everything that decided the contents.
            report: Counts to keep beside the writer's own.
            label_attributes: What the labels behind the prompts are of.
        """
        for column in self._columns.values():
            column.finish()
        meta = {
            "fingerprint": fingerprint,
            "ids_hash": _hash([self._folder / f"{name}.npy" for name in _IDS]),
            "label_attributes": tuple(label_attributes),
            "attribute_names": self._attribute_names,
            "report": {**self._counts, **report},
            "checksums": {name: _checksum(self._folder / f"{name}.npy") for name in _DTYPES},
        }
        with open(self._folder / "meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


class _Column:
    """A ``.npy`` file that grows: its header is written last, when the number of rows is known."""

    def __init__(self, path: Path, dtype: np.dtype[Any], width: int | None) -> None:
        self.file = open(path, "wb")  # noqa: SIM115 — TokenWriter closes it
        self.file.write(bytes(_HEADER_BYTES))
        self.rows = 0
        self._dtype = dtype
        self._width = width

    def add(self, values: npt.ArrayLike) -> None:
        """Append rows."""
        array = np.ascontiguousarray(values, dtype=self._dtype)
        self.file.write(array.tobytes())
        self.rows += len(array)

    def finish(self) -> None:
        """Write the header and sync. Format: numpy.lib.format, version 1.0."""
        shape = (self.rows,) if self._width is None else (self.rows, self._width)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        text = repr(header).encode().ljust(_HEADER_BYTES - 11) + b"\n"
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
        self.file.flush()
        os.fsync(self.file.fileno())


def _checksum(path: Path) -> int:
    """CRC-32 of a file, read in parts."""
    value = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            value = zlib.crc32(part, value)
    return value


def _hash(paths: Sequence[Path]) -> str:
    """SHA-256 of arrays, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(np.load(path, mmap_mode="r").data)
    return digest.hexdigest()
