"""Exports of steps on the way, for ``helpsteer2 select``."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpsteer2.callbacks.checkpoints import Cadence
from helpsteer2.commands.select import candidate_models
from helpsteer2.commands.train import train
from helpsteer2.errors import UserError
from tests.training.runs import arguments

WEIGHTS = "model.safetensors"


def trained(run_dir: Path, max_steps: int) -> dict[str, bytes]:
    """Weights of the exports that a run keeps, by name."""
    given = arguments(run_dir, max_steps=max_steps, validate_every=None, optimized_metric=None)
    train(**given | {"schedule": Cadence(None, 3, "last", export_every=2)})
    exports = sorted((run_dir / "exports").iterdir())
    return {path.name: (path / WEIGHTS).read_bytes() for path in exports}


def test_a_run_keeps_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", 5)
    assert list(whole) == ["step_000002", "step_000004", "step_000005"]
    assert len(set(whole.values())) == 3
    assert whole["step_000005"] == (tmp_path / "whole" / "export" / WEIGHTS).read_bytes()
    assert list(candidate_models(str(tmp_path / "whole"))) == list(whole)
    # A run that goes on makes the very same.
    trained(tmp_path / "resumed", 3)
    resumed = trained(tmp_path / "resumed", 5)
    assert {name: resumed[name] for name in whole} == whole


def test_no_run_keeps_any_by_default() -> None:
    assert not any(Cadence().exports(step, step == 10) for step in range(1, 11))
    assert [s for s in range(1, 8) if Cadence(export_every=3).exports(s, s == 7)] == [3, 6, 7]
    with pytest.raises(UserError, match="export_every"):
        Cadence(export_every=0)
