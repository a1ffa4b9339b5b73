"""Groups that are held out from training and stand in it all the same.

Two hashes of 8 bytes tell a group: of its prompt, and of its prompt with its responses in any
order. So neither texts nor ids are held in memory, however many groups there are.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from helpsteer2.data.groups import Group, GroupSource
from helpsteer2.data.rows import problem_at
from helpsteer2.errors import Problem

_BYTES = 8


class GroupHashes:
    """Hashes of the groups of a split, in their order."""

    def __init__(self) -> None:
        self._prompts = array("Q")
        self._groups = array("Q")

    def __len__(self) -> int:
        """Number of groups."""
        return len(self._groups)

    def add(self, prompt: bytes, responses: Iterable[bytes]) -> None:
        """Append a group.

        Args:
            prompt: Its text or its ids.
            responses: Those of each response.
        """
        of_prompt = _hash(prompt)
        self._prompts.append(int.from_bytes(of_prompt, "little"))
        whole = _hash(of_prompt + b"".join(sorted(map(_hash, responses))))
        self._groups.append(int.from_bytes(whole, "little"))

    def add_texts(self, group: Group) -> None:
        """Append a group by its texts; what is marked for training in its prompt is left out."""
        prompt = json.dumps([[message["role"], message["content"]] for message in group.prompt])
        self.add(prompt.encode(), (response.encode() for response in group.responses))

    def found_in(self, train: GroupHashes) -> Overlap:
        """Which of these groups stand in train as well.

        Args:
            train: Hashes of the training groups, made in the same way.
        """
        whole = _first_places(self._groups, train._groups)
        prompts = _first_places(self._prompts, train._prompts)
        alone = {place: twin for place, twin in prompts.items() if place not in whole}
        return Overlap(whole, alone)


@dataclass(frozen=True)
class Overlap:
    """Held-out groups that stand in train: position in their split → in train of the first such.

    Attributes:
        whole: Those whose prompt and responses, in any order, are the same.
        prompt_alone: Those whose prompt is the same, and the responses are not.
    """

    whole: Mapping[int, int]
    prompt_alone: Mapping[int, int]


def text_hashes(source: GroupSource, split: str, chosen: npt.NDArray[np.int64]) -> GroupHashes:
    """Hashes by their texts of some groups of a split.

    Args:
        source: Where the split is read, all of it.
        split: Its name.
        chosen: ``(G,)`` positions of the groups, ascending.
    """
    hashes, wanted = GroupHashes(), iter(chosen.tolist())
    following = next(wanted, None)
    for position, group in enumerate(source.read(split, _tell_nobody)):
        if position == following:
            hashes.add_texts(group)
            following = next(wanted, None)
    return hashes


def name_twins(
    source: GroupSource, split: str, twins: Mapping[int, int], message: str
) -> Iterator[Problem]:
    """Say of held-out groups which rows they are, and which rows of train they repeat.

    Reads the source once more, since hashes do not tell where a group comes from.

    Args:
        source: Where both splits are read.
        split: The held-out one.
        twins: Position in ``split`` → in train, as ``Overlap`` has them.
        message: What is the matter with such a group; the row of train follows.

    Yields:
        One problem a group, in order; nothing is read if there is none.
    """
    if not twins:
        return
    held_out, train = _places(source, split, twins), _places(source, "train", twins.values())
    for position, twin in twins.items():
        yield problem_at(held_out[position], f"{message} ({train[twin]})")


def _tell_nobody(problem: Problem) -> None:
    """Whoever counted the positions of groups has told of the bad rows, which have none."""


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_BYTES).digest()


def _first_places(wanted: array[int], found: array[int]) -> dict[int, int]:
    """Position of each wanted hash that is found → the first position where it is."""
    values, first = np.unique(_numbers(found), return_index=True)
    if not len(values):
        return {}
    hashes = _numbers(wanted)
    nearest = np.minimum(np.searchsorted(values, hashes), len(values) - 1)
    positions = np.flatnonzero(values[nearest] == hashes)
    return dict(zip(positions.tolist(), first[nearest[positions]].tolist(), strict=True))


def _numbers(hashes: array[int]) -> npt.NDArray[np.uint64]:
    return np.array(hashes, dtype=np.uint64)


def _places(source: GroupSource, split: str, positions: Iterable[int]) -> dict[int, str]:
    """Where the groups at some positions of a split were read."""
    wanted = set(positions)
    groups = enumerate(source.read(split, _tell_nobody))
    return {position: group.source for position, group in groups if position in wanted}
