"""What all tests share: no network, one thread a process, and where real data lies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Before torch, transformers or wandb is imported, here and in every process that a test starts.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "MKL_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
    }
)

# A shell has its background jobs ignore Ctrl-C, and every process that a test starts would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REAL_DATA = "HELPSTEER2_REAL_DATA"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep tokenised data out of the user's cache, also in processes that tests start."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["HELPSTEER2_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real data files, or the test is skipped."""
    if not os.environ.get(REAL_DATA):
        pytest.skip(f"{REAL_DATA} is not set: it names a folder of real data files")
    folder = Path(os.environ[REAL_DATA])
    if not folder.is_dir():
        pytest.skip(f"{REAL_DATA}={folder} is no folder")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; torch is imported only if something does."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
