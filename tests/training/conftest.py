"""One fork server for all children, started with everything imported."""

from __future__ import annotations

import multiprocessing

import pytest

from tests.training.runs import ROOT


@pytest.fixture(scope="session", autouse=True)
def fork_server():
    """Import once what every child needs; children inherit one thread and no network."""
    changes = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setenv(name, value)
        multiprocessing.set_forkserver_preload(["tests.training.runs", "peft"])
        from multiprocessing import forkserver

        forkserver.ensure_running()
        yield


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Sums of one thread: figures of two processes are compared to the last bit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy to start from; read only."""
    from tests.training.policies import train_policy

    return train_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def initial(policy: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The reference log-probabilities of the policy that training starts from; read only."""
    from tests.training.policies import refer

    return refer(tmp_path_factory.mktemp("reference"), policy)
