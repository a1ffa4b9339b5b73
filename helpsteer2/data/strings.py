"""Many strings in one array of bytes, such as the ids of groups in a memory map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt


class Strings(Sequence[str]):
    """Strings stored end to end as UTF-8, decoded one at a time.

    Args:
        data: All bytes.
        starts: First byte of each string.
        ends: End of each string.
    """

    def __init__(
        self,
        data: npt.NDArray[np.uint8],
        starts: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
    ) -> None:
        self._data = data
        self._starts = starts
        self._ends = ends

    def __len__(self) -> int:
        """Number of strings."""
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """One string, or a list of several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return self._data[self._starts[i] : self._ends[i]].tobytes().decode("utf-8")

    def select(self, positions: npt.NDArray[np.int64]) -> Strings:
        """Those at some positions."""
        return Strings(self._data, self._starts[positions], self._ends[positions])
