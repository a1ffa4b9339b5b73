"""Composing a configuration with Hydra, collecting every wrong override instead of the first."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import helpsteer2
from helpsteer2.config.annotations import TARGET
from helpsteer2.config.modules import NotFound
from helpsteer2.config.signatures import Signature, read_signature
from helpsteer2.config.validate import PASSED_BY_CODE, Mistake, near_miss

VERSION_BASE = "1.3"
"""Behaviour of Hydra that the configuration is written for."""

_ERRORS = (HydraException, MissingConfigException, OmegaConfBaseException, ValueError, TypeError)
_NAMED_KEY = re.compile(r"Could not (?:override|append|delete)[^'\n]*'([^']+)'")

ALL_JOBS = 64
"""Sweeps of more jobs are checked value by value instead of in every combination."""


def conf_dir() -> Path:
    """Folder of the project's YAML files: beside the code in a wheel, above it in a checkout."""
    package = Path(helpsteer2.__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


@dataclass(frozen=True)
class Composition:
    """A configuration as far as it could be composed.

    Attributes:
        config: The job's configuration, unresolved; None if not even the defaults compose.
        overrides: The good overrides, with ``++`` before those that set an argument no file names.
        mistakes: One for each override left out.
        choices: Chosen options of each config group.
        sweeper_params: Sweeps written in the configuration, as overrides.
        is_multirun: Whether the configuration itself asks for a sweep (``hydra.mode``).
    """

    config: DictConfig | None
    overrides: list[str]
    mistakes: list[Mistake]
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sweeper_params: list[str] = field(default_factory=list)
    is_multirun: bool = False


class Composer:
    """Composes the configuration of one command; made by ``composer``.

    Args:
        config_name: Name of the root file in ``conf``.
        target: Dotted path of the command's function.
        extra_overrides: Put before the user's own.
    """

    def __init__(self, config_name: str, target: str, extra_overrides: Sequence[str]) -> None:
        self.config_name = config_name
        self.target = target
        self.extra_overrides = list(extra_overrides)

    def compose(self, overrides: Sequence[str]) -> Composition:
        """Compose without sweeps.

        Args:
            overrides: Overrides as typed.

        Returns:
            The configuration made from the good overrides, and what is wrong with the others.
        """
        good, mistakes = self.well_formed(overrides)
        for text in [text for text in good if self.parse([text])[0].is_sweep_override()]:
            good.remove(text)
            message = "holds several values: add -m to run each, or write [a,b] for a list"
            mistakes.append(Mistake(text, message))
        config, unknown = self._compose_good(good, mistakes)
        if config is not None and unknown:
            added = dict(self._resolve_unknown(config, unknown, mistakes))
            if added:
                good = [added.get(o, o) for o in overrides if o in good or o in added]
                config, unknown = self._compose_good(good, mistakes)
                mistakes += [Mistake(o, "no such key") for o in unknown]
        if config is None:
            return Composition(None, good, mistakes)
        return self._composition(config, good, mistakes)

    def _composition(
        self, config: DictConfig, overrides: list[str], mistakes: list[Mistake]
    ) -> Composition:
        hydra = config.hydra
        params = OmegaConf.select(hydra, "sweeper.params") or {}
        # Interpolations such as ${hydra:job.num} are resolved by the first job of a sweep.
        with open_dict(hydra):
            hydra.job.num, hydra.job.id = 0, "0"
        HydraConfig.instance().set_config(config)
        job = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        mode = OmegaConf.select(hydra, "mode")
        return Composition(
            job,
            overrides,
            mistakes,
            choices={
                str(group): tuple(choice) if isinstance(choice, ListConfig) else (str(choice),)
                for group, choice in hydra.runtime.choices.items()
                if choice is not None
            },
            sweeper_params=[f"{key}={value}" for key, value in params.items()],
            is_multirun=mode is not None and mode.name == "MULTIRUN",
        )

    def well_formed(self, overrides: Sequence[str]) -> tuple[list[str], list[Mistake]]:
        """Tell overrides that follow Hydra's grammar from those that do not.

        Args:
            overrides: Overrides as typed.

        Returns:
            The good ones, and a mistake for each of the others.
        """
        good, mistakes = [], []
        for text in overrides:
            try:
                self.parse([text])
                good.append(text)
            except _ERRORS as error:
                key, equals, value = text.partition("=")
                reason = str(error).splitlines()[0]
                hint = f"; quote its value: {key}=\"'{value}'\""
                message = f"is no override Hydra can read ({reason}){hint}"
                mistakes.append(
                    Mistake(text, message if equals else "is not of the form key=value")
                )
        return good, mistakes

    def parse(self, overrides: list[str]) -> list[Override]:
        """Parse overrides by Hydra's grammar."""
        loader = GlobalHydra.instance().config_loader()
        return OverridesParser.create(config_loader=loader).parse_overrides(overrides)

    def _compose_good(
        self, good: list[str], mistakes: list[Mistake]
    ) -> tuple[DictConfig | None, list[str]]:
        """Compose, leaving out what fails: unknown keys are returned, the rest is a mistake."""
        unknown: list[str] = []
        while True:
            try:
                return self._compose(good), unknown
            except _ERRORS as error:
                culprit = self._culprit(error, good)
                if culprit is None:
                    mistakes.append(Mistake(self.config_name, _first_lines(error)))
                    return None, unknown
                if "is not in struct" in str(error.__cause__):
                    absent = dict.fromkeys([culprit, *self._absent(good)])
                    unknown += absent
                    good[:] = [text for text in good if text not in absent]
                else:
                    mistakes.append(self._explain(culprit, error))
                    good.remove(culprit)
            except yaml.YAMLError as error:
                mistakes.append(Mistake(self.config_name, f"a file is no valid YAML: {error}"))
                return None, unknown

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        return compose(
            self.config_name,
            overrides=[*self.extra_overrides, *overrides],
            return_hydra_config=True,
        )

    def _absent(self, overrides: Sequence[str]) -> list[str]:
        """Overrides of keys that do not exist, found in one go instead of one by one."""
        loader = GlobalHydra.instance().config_loader()
        keys = {}
        for text in overrides:
            override = self.parse([text])[0]
            is_value = not loader.get_group_options(override.key_or_group, results_filter=None)
            if is_value and override.type is OverrideType.CHANGE:
                keys[text] = override.key_or_group
        try:
            config = self._compose([text for text in overrides if text not in keys])
        except _ERRORS:
            return []
        return [
            text
            for text, key in keys.items()
            # A dict given to a key above it may bring it.
            if not _holds(config, key)
            and not any(key.startswith(f"{other}.") for other in keys.values())
        ]

    def _culprit(self, error: Exception, overrides: Sequence[str]) -> str | None:
        """The override that an error is about; None if the files alone fail."""
        named = _NAMED_KEY.search(str(error))
        missing = getattr(error, "missing_cfg_file", None)
        for text in reversed(overrides):
            override = self.parse([text])[0]
            if named and override.get_key_element().lstrip("+~") == named.group(1):
                return text
            if missing and f"{override.key_or_group}/{override.value()}" == missing:
                return text
        fails, passes = len(overrides), 0
        if self._fails([]):
            return None
        while fails - passes > 1:
            middle = (fails + passes) // 2
            fails, passes = (middle, passes) if self._fails(overrides[:middle]) else (fails, middle)
        return overrides[fails - 1] if overrides else None

    def _fails(self, overrides: Sequence[str]) -> bool:
        try:
            self._compose(overrides)
        except _ERRORS:
            return True
        return False

    def _explain(self, text: str, error: Exception) -> Mistake:
        """Say in one line what is wrong with an override."""
        override = self.parse([text])[0]
        group, loader = override.key_or_group, GlobalHydra.instance().config_loader()
        if (
            isinstance(error, MissingConfigException)
            and error.missing_cfg_file == f"{group}/{override.value()}"
        ):
            options = list(_options(loader, group))
            close = near_miss(str(override.value()), options)
            there = " There" if close else "; there"
            message = f"no such {group}{close}{there} are {', '.join(options)}"
        else:
            message = _first_lines(error)
        return Mistake(text, message)

    def _resolve_unknown(
        self, config: DictConfig, unknown: Sequence[str], mistakes: list[Mistake]
    ) -> Iterator[tuple[str, str]]:
        """Of overrides of keys that no file names, let those pass that name an argument."""
        for text in unknown:
            override = self.parse([text])[0]
            key = override.key_or_group
            place, names, takes_any = self._place(config, key)
            if override.type is OverrideType.CHANGE:
                rest = key[len(place) + 1 :] if place else key
                if rest.partition(".")[0] in names and not takes_any:
                    yield text, f"++{text}"
                    continue
            mistakes.append(Mistake(text, self._unknown_message(config, key, place, names)))

    def _place(self, config: DictConfig, key: str) -> tuple[str, set[str], bool]:
        """The deepest node above a key.

        Returns:
            Its path, the arguments its signature takes, and whether it is plain data that may hold
            any key.
        """
        parts, node, depth = key.split("."), config, 0
        while depth < len(parts) - 1 and isinstance(
            OmegaConf.select(node, parts[depth]), DictConfig
        ):
            node, depth = node[parts[depth]], depth + 1
        place = ".".join(parts[:depth])
        target = node.get(TARGET) if depth else self.target
        signature = _signature(target) if isinstance(target, str) else None
        if signature is None:
            return place, set(), True
        return place, set(signature.parameters) - (PASSED_BY_CODE if not depth else set()), False

    def _unknown_message(self, config: DictConfig, key: str, place: str, names: set[str]) -> str:
        """Say that there is no such key, and which one was probably meant."""
        node = OmegaConf.select(config, place) if place else config
        siblings = names | {str(name) for name in node}
        last = key.rpartition(".")[2]
        loader = GlobalHydra.instance().config_loader()
        if not place:
            siblings |= set(_options(loader, "", ObjectType.GROUP))
        paths = [path for path in _paths(config) if not path.startswith("hydra.")]
        is_child = key == (f"{place}.{last}" if place else last)
        close = near_miss(last, siblings) if is_child else near_miss(key, paths)
        ending = [path for path in paths if path.rpartition(".")[2] == last]
        if not close and ending:
            close = f"; did you mean {' or '.join(ending[:2])}?"
        hint = f"{' To' if close else '; to'} add it, write +{key}=…" if not names else ""
        return f"no such key{f' in {place}' if place else ''}{close}{hint}"

    def jobs(self, overrides: Sequence[str]) -> list[list[str]]:
        """The overrides of each job of a sweep.

        Args:
            overrides: Well-formed overrides, sweeps among them.

        Returns:
            Every combination if there are few; else every value once, the others at their first.
        """
        parsed = self.parse(list(overrides))
        values = [_sweep_values(o) if o.is_sweep_override() else [o.input_line] for o in parsed]
        texts = [[str(text) for text in column] for column in values]
        total = 1
        for column in texts:
            total *= len(column)
        if total <= ALL_JOBS:
            return [list(job) for job in itertools.product(*texts)]
        first = [column[0] for column in texts]
        return [
            [*first[:i], text, *first[i + 1 :]] for i, column in enumerate(texts) for text in column
        ]


def _holds(config: DictConfig, key: str) -> bool:
    """Whether a configuration has a key, whatever its value."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if isinstance(node, ListConfig):
        return name.isdigit() and int(name) < len(node)
    # `name in node` is false for a value that is still missing.
    return isinstance(node, DictConfig) and not node._is_none() and name in list(node)


def _sweep_values(override: Override) -> list[str]:
    """One override for each value of a sweep; the two ends of an interval."""
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    return [f"{key}={item}" for item in override.sweep_string_iterator()]


def _signature(target: str) -> Signature | None:
    try:
        return read_signature(target)
    except NotFound:
        return None


def _options(
    loader: ConfigLoader, group: str, kind: ObjectType = ObjectType.CONFIG
) -> Iterator[str]:
    """Options of a config group (or the groups themselves), those in sub-folders included."""
    yield from loader.get_group_options(group, results_filter=kind)
    if kind is ObjectType.CONFIG:
        for inner in loader.get_group_options(group, results_filter=ObjectType.GROUP):
            yield from (f"{inner}/{name}" for name in _options(loader, f"{group}/{inner}"))


def _paths(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted path of every value of a configuration."""
    for key, value in config.items_ex(resolve=False):
        path = f"{prefix}{key!s}"
        yield path
        if isinstance(value, DictConfig) and not value._is_none():
            yield from _paths(value, f"{path}.")


def _first_lines(error: BaseException) -> str:
    """What Hydra says, in one line; where it says nothing, what its cause says."""
    lines = [line.strip() for line in str(error).partition("Config search path")[0].splitlines()]
    said = " ".join(line for line in lines[:3] if line)
    return said if said or error.__cause__ is None else _first_lines(error.__cause__)


@contextmanager
def composer(
    config_name: str, target: str, conf: Path | None = None, extra_dir: str | None = None
) -> Iterator[Composer]:
    """Set Hydra up for composing one command's configuration.

    Args:
        config_name: Name of the root file.
        target: Dotted path of the command's function.
        conf: Folder of the YAML files; the project's own if None.
        extra_dir: Folder searched as well (``--config-dir``).

    Yields:
        The composer, to be used inside the block.
    """
    folder = (conf or conf_dir()).resolve()
    extra = [f"hydra.searchpath=['file://{Path(extra_dir).resolve()}']"] if extra_dir else []
    previous = HydraConfig.instance().cfg
    with initialize_config_dir(str(folder), version_base=VERSION_BASE):
        try:
            yield Composer(config_name, target, extra)
        finally:
            HydraConfig.instance().cfg = previous
