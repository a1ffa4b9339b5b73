"""Policies that are sure of something, and the fork server of the tests of training."""

from __future__ import annotations

import pytest

from tests.rollouts.runs import lively_policy
from tests.training.conftest import fork_server, one_thread

__all__ = ["fork_server", "one_thread"]


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy to start from; read only."""
    return lively_policy(tmp_path_factory.mktemp("policy"), seed=1)


@pytest.fixture(scope="session")
def other_policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another one with the same tokenizer; read only."""
    return lively_policy(tmp_path_factory.mktemp("other"), seed=2)
