"""Hashes of files and folders; a file that has not changed since is not read again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from helpsteer2.errors import UserError
from helpsteer2.records import write_json_atomic

_CHUNK = 1 << 20
_SETTLED_NS = 2_000_000_000
"""A file changed more recently could change again within the same tick of the file system."""


class Contents:
    """SHA-256 of files, remembered by size, times and inode.

    Args:
        memory: JSON file with what was hashed before; may be missing, damaged or out of date.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known = _read(memory)
        self._new: dict[str, list[int | str]] = {}

    def of_file(self, path: Path) -> str:
        """Hash of a file's content.

        Args:
            path: The file.

        Raises:
            UserError: If it cannot be read.
        """
        name = os.path.abspath(path)
        try:
            status = os.stat(name)
            stamp: list[int | str] = [
                status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
            ]  # fmt: skip
            known = self._known.get(name)
            if known is not None and known[:-1] == stamp:
                return str(known[-1])
            digest = _digest(name)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        if time.time_ns() - status.st_ctime_ns > _SETTLED_NS:
            self._known[name] = self._new[name] = [*stamp, digest]
        return digest

    def of_files(self, folder: Path, path: str) -> dict[str, str]:
        """Hashes of the files at or below a path, hidden ones left out.

        Args:
            folder: Names in the result are relative to it.
            path: A file or folder in it; nothing is there if it is missing.

        Returns:
            Name → hash, in the order of the names.
        """
        start = folder / path
        found = [start] if start.is_file() else sorted(start.rglob("*"))
        names = {file.relative_to(folder).as_posix(): file for file in found if file.is_file()}
        return {
            name: self.of_file(file)
            for name, file in names.items()
            if not any(part.startswith(".") for part in name.split("/"))
        }

    def of_path(self, path: Path) -> str:
        """Hash of a file, or of all files of a folder with their names; not of its own name."""
        if path.is_file():
            return self.of_file(path)
        return combined(self.of_files(path, "."))

    def save(self) -> None:
        """Remember what was hashed since; nothing is written beside a folder that is not there.

        Raises:
            UserError: If the file cannot be written.
        """
        if not self._new or not self._memory.parent.is_dir():
            return
        merged = {**_read(self._memory), **self._new}
        there = {name: entry for name, entry in merged.items() if os.path.exists(name)}
        write_json_atomic(self._memory, there)
        self._new.clear()


def combined(files: Mapping[str, str]) -> str:
    """One hash of several files.

    Args:
        files: Name → hash.
    """
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def _digest(name: str) -> str:
    hashed = hashlib.sha256()
    with open(name, "rb") as file:
        while chunk := file.read(_CHUNK):
            hashed.update(chunk)
    return hashed.hexdigest()


def _read(memory: Path) -> dict[str, list[int | str]]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
