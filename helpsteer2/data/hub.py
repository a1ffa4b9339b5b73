"""Data sets of the Hugging Face Hub, through ``datasets``; without network they fail at once."""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from helpsteer2.errors import UserError

PROBE_SECONDS = 2.0
"""Time the Hub has to accept a connection. Its own client goes on retrying for 20 s and more."""

_TRUE = {"1", "ON", "YES", "TRUE"}


def load(path: str, split: str, data_dir: str | None, wanted_files: str) -> Any:
    """Load one table of a Hub data set, or its cached copy if the Hub cannot be reached.

    Args:
        path: Hub id, ``owner/name``.
        split: Split on the Hub.
        data_dir: Folder of the repository that holds the table, None for its root.
        wanted_files: Files a local copy would hold, for the message.

    Returns:
        A ``datasets.Dataset``.

    Raises:
        UserError: If it cannot be loaded; the message names the local way.
    """
    offline = offline_by_environment() or not is_reachable()
    instead = f"use local files instead: data.path=DIR, a folder that holds {wanted_files}"
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path}: reading from the Hub needs `pip install datasets`; or {instead}"
        ) from error
    try:
        with _offline_mode(datasets, offline):
            # Of several cached configurations the client takes the latest if none is named.
            name = "default" if offline and data_dir is None else None
            return datasets.load_dataset(path, name, data_dir=data_dir, split=split)
    except Exception as error:  # The client raises whatever its HTTP library and builders raise.
        if offline:
            reason = (
                "offline mode is set (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE)"
                if offline_by_environment()
                else f"the Hub at {_endpoint()} cannot be reached"
            )
            message = f"{path}: no such local folder, {reason}, and no copy is cached; {instead}"
        else:
            message = f"{path}: the Hub gave no split {split!r} ({error}); or {instead}"
        raise UserError(message) from error


def fingerprint(path: str, split: str, data_dir: str | None, wanted_files: str) -> str:
    """Fingerprint of a Hub table: it follows the revision of the repository that was resolved."""
    return str(load(path, split, data_dir, wanted_files)._fingerprint)


def hub_unreachable() -> str | None:
    """Why the Hub cannot be asked now, or None if it can."""
    if offline_by_environment():
        return "offline mode is set (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE or TRANSFORMERS_OFFLINE)"
    return None if is_reachable() else f"the Hub at {_endpoint()} cannot be reached"


def require_hub(what: str, alternative: str) -> None:
    """Refuse to ask the Hub for something while it is out of reach, within ``PROBE_SECONDS``.

    Args:
        what: What is wanted, for the message: ``the tokenizer 'Qwen/Qwen3-0.6B'``.
        alternative: What to do without a network: ``set backbone.path to a local folder``.

    Raises:
        UserError: If the Hub is offline or unreachable.
    """
    reason = hub_unreachable()
    if reason is not None:
        raise UserError(f"cannot fetch {what}: {reason}; {alternative}")


def offline_by_environment() -> bool:
    """Whether the user told the Hugging Face libraries to stay offline."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)


def is_reachable() -> bool:
    """Whether the Hub, or the proxy on the way to it, accepts a connection in time."""
    url = urlsplit(_endpoint())
    host = url.hostname or ""
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    address = (url.hostname or "", url.port or (80 if url.scheme == "http" else 443))
    answered = threading.Event()

    def connect() -> None:
        try:
            with socket.create_connection(address, PROBE_SECONDS):
                answered.set()
        except OSError:
            return
        finally:
            done.set()

    # In a thread, because looking up a name heeds no timeout.
    done = threading.Event()
    threading.Thread(target=connect, daemon=True).start()
    done.wait(PROBE_SECONDS)
    return answered.is_set()


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@contextmanager
def _offline_mode(datasets: Any, offline: bool) -> Iterator[None]:
    """Keep the Hub's client from retrying for the length of one call.

    The environment variables are read once at import, so the constants made from them are set.
    """
    if not offline:
        yield
        return
    from huggingface_hub import constants

    places = [(constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(place, name) for place, name in places]
    try:
        for place, name in places:
            setattr(place, name, True)
        yield
    finally:
        for (place, name), value in zip(places, before, strict=True):
            setattr(place, name, value)
