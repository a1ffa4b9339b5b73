"""What a run leaves behind: files written whole or not at all, and what it ran on."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from importlib import metadata
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from helpsteer2.errors import UserError

PACKAGES = (
    "helpsteer2",
    "torch",
    "transformers",
    "tokenizers",
    "pytorch-lightning",
    "datasets",
    "numpy",
    "scipy",
    "safetensors",
    "hydra-core",
    "flash-attn",
)
"""Packages whose versions can change a figure."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more: it is full, or a quota or a limit says so."""


def write_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Write a file whole or not at all: write aside, fsync, rename, fsync the folder.

    Args:
        path: The file; its folder is made if need be.
        write: Writes the content to the open file.

    Raises:
        UserError: If it cannot be written (no permission, disk full); an older file stays.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error


def append(file: FileIO, content: bytes) -> None:
    """Write bytes to the end of a file that grows.

    Such a file is opened with ``buffering=0``. What could not be written stays in a buffer, and is
    tried again when the file is closed: that error would take the place of what the user was told.

    Args:
        file: Opened with mode ``ab`` or ``a+b``, unbuffered.
        content: What to write; a part of it may be there if this fails.

    Raises:
        OSError: If not all of it can be written.
    """
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def reason(error: OSError) -> str:
    """Why something cannot be written, and what to do about a full disk."""
    told = error.strerror or str(error)
    if error.errno in NO_ROOM:
        told += "; make room, then give the same command again"
    return told


def write_json_atomic(path: str | os.PathLike[str], payload: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all.

    Args:
        path: The file; its folder is made if need be.
        payload: What to write, made plain by ``plain``.

    Raises:
        UserError: If it cannot be written (no permission, disk full); an older file stays.
        TypeError: If the payload holds something that is no data.
    """
    text = json.dumps(plain(payload), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, lambda file: _write_all(file, text.encode("utf-8")))


def _write_all(file: BinaryIO, content: bytes) -> None:
    file.write(content)


def plain(value: Any) -> Any:
    """Turn nested data into what ``json`` writes; NaN and infinity, which JSON lacks, become null.

    Args:
        value: Mappings, sequences, dataclasses, NumPy or torch scalars and arrays, paths, literals.

    Returns:
        Dicts, lists, strings, finite numbers, booleans and None.

    Raises:
        TypeError: If something in it is no data.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # NumPy and torch alike, without importing either.
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} is no data: {value!r}")


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare two configurations.

    Args:
        old: Nested mappings; lists count as values.
        new: Likewise.

    Returns:
        Dotted key → old and new value, None for a key that is not there.
    """
    before, after = dict(flat(plain(old))), dict(flat(plain(new)))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by dotted key; lists and empty mappings count as values.

    Args:
        node: Nested mappings.
        prefix: Put before every key.
    """
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_among(key: str, keys: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of the keys, or below one of them."""
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def environment() -> dict[str, Any]:
    """What a run ran on: versions, commit and hardware; no host name and no path of the user.

    Returns:
        ``python``, ``platform``, ``packages``, ``git`` and ``hardware``.
    """
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": _versions(),
        "git": _git_state(),
        "hardware": _hardware(),
    }


def _versions() -> dict[str, str]:
    """Versions of the packages that are installed, without importing them."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that the code runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "uncommitted_changes": bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _hardware() -> dict[str, Any]:
    """Processor, cores, memory, and the accelerators if torch is in use."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "accelerators": [],
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            count = range(torch.cuda.device_count())
            found["accelerators"] = [torch.cuda.get_device_name(index) for index in count]
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return float(round(total / 2**30, 1))


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
