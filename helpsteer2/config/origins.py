"""Where a configured value was written: a file and line, or the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

_PACKAGE = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)


def origin(
    path: str,
    folders: Sequence[Path],
    config_name: str,
    choices: Mapping[str, Sequence[str]],
    overrides: Sequence[str],
) -> str:
    """Name the place that set a value.

    Args:
        path: Dotted path of the value.
        folders: Folders of YAML files, the first to win.
        config_name: Name of the root file.
        choices: Chosen options of each config group.
        overrides: Overrides of the command line.

    Returns:
        ``command line``, ``conf/….yaml:line``, or an empty string if no place is found.
    """
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        is_above = path.startswith(f"{key}.") and key not in choices
        if path == key or is_above:
            return "" if path == override else "command line"
    files = list(_files(folders, config_name, choices))
    parent = path.rpartition(".")[0]
    for wanted in (path, parent):
        for file, package in files:
            line = _line(file, package, wanted) if wanted else None
            if line is not None:
                return f"{_shown(file)}:{line}"
    return ""


def _files(
    folders: Sequence[Path], config_name: str, choices: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Path, str]]:
    """The files of a composition and the package each fills, the last to be merged first."""
    ordered = sorted(choices.items(), key=lambda item: item[0] != "experiment")
    for key, names in ordered:
        group, _, package = key.partition("@")
        for name in names:
            if not group.startswith("hydra"):
                for file, own_package in _with_parents(folders, group, name):
                    yield file, package or own_package
    yield from _with_parents(folders, "", config_name)


def _with_parents(folders: Sequence[Path], group: str, name: str) -> Iterator[tuple[Path, str]]:
    """A file, and those of its own group that its defaults list names."""
    found = [folder / group / f"{name}.yaml" for folder in folders]
    file = next((path for path in found if path.is_file()), None)
    if file is None:
        return
    text = file.read_text(encoding="utf-8")
    header = _PACKAGE.search(text)
    package = header.group(1) if header else "_group_"
    yield file, {"_group_": group.replace("/", "."), "_global_": ""}.get(package, package)
    content = yaml.safe_load(text)
    defaults = content.get("defaults", []) if isinstance(content, dict) else []
    inner = (f"{group}/{name}").rpartition("/")[0].lstrip("/")
    for entry in defaults:
        if isinstance(entry, str) and entry != "_self_":
            absolute = entry.startswith("/")
            parent, _, last = entry.lstrip("/").rpartition("/")
            folder = parent if absolute else f"{inner}/{parent}".strip("/")
            yield from _with_parents(folders, folder, last)


def _line(file: Path, package: str, path: str) -> int | None:
    """1-based line of a dotted path in a file, None if it is not there."""
    if package:
        if not path.startswith(f"{package}."):
            return None
        path = path[len(package) + 1 :]
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    line = None
    for part in path.split("."):
        if isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
            continue
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        match = next(((key, value) for key, value in pairs if key.value == part), None)
        if match is None:
            return None
        line, node = match[0].start_mark.line + 1, match[1]
    return line


def _shown(file: Path) -> str:
    """A path as short as it can be said."""
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)
