"""What figures do not tell of a validation: some of its groups, and plots of all scores."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch

from helpsteer2 import plots
from helpsteer2.callbacks.checkpoints import validation_metrics
from helpsteer2.callbacks.wandb import WandbView
from helpsteer2.data.groups import Group
from helpsteer2.functional import statistics
from helpsteer2.modules.scored import ScoredSplit
from helpsteer2.records import write_atomic

logger = logging.getLogger(__name__)

SAMPLES = 8
"""Groups shown, always the first of the split, so that runs can be compared."""


@dataclass(frozen=True)
class Sample:
    """One response of the validation split (or all of a group, if they are rated together).

    Attributes:
        id: Of its group.
        prompt: The messages of the prompt, each after its role.
        response: The text.
        rated: Known ratings by name; None where unknown.
        predicted: Predictions by name.
    """

    id: str
    prompt: str
    response: str
    rated: dict[str, float | None]
    predicted: dict[str, float]


class ValidationReport(pl.Callback):
    """Keeps the scores of the validation whose weights are exported, and reports them at the end.

    ``publish`` writes ``samples.jsonl``, ``plots/scatter.png`` and ``plots/calibration.png``, and
    shows them on W&B. A module that leaves no ``scored`` split behind has nothing to report.

    Args:
        folder: The run's folder.
        export: Whose scores are kept: of the lowest validation loss, or of the last validation.
        groups: Reads the validation split from its start.
        view: The W&B run, if there is one.
    """

    def __init__(
        self,
        folder: Path,
        export: Literal["best", "last"],
        groups: Callable[[], Iterable[Group]],
        view: WandbView | None,
    ) -> None:
        self.folder = folder
        self.export = export
        self.groups = groups
        self.view = view
        self._step = 0
        self._metrics: dict[str, float] = {}
        self._scored: ScoredSplit | None = None

    def state_dict(self) -> dict[str, Any]:
        """The scores kept so far, as tensors: a resumed run reports what it would have."""
        if self._scored is None:
            return {}
        arrays = {name: getattr(self._scored, name) for name in ("groups", "scores", "ratings")}
        return {
            "step": self._step,
            "metrics": self._metrics,
            "names": list(self._scored.names),
            "unit": self._scored.unit,
            **{name: torch.from_numpy(array) for name, array in arrays.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        if not state_dict:
            return
        self._step, self._metrics = state_dict["step"], state_dict["metrics"]
        self._scored = ScoredSplit(
            names=tuple(state_dict["names"]),
            groups=state_dict["groups"].numpy(),
            scores=state_dict["scores"].numpy(),
            ratings=state_dict["ratings"].numpy(),
            unit=state_dict["unit"],
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the scores if their weights are the ones to be exported so far."""
        scored, metrics = pl_module.scored, validation_metrics(trainer)
        if scored is None:
            return
        is_better = not self._metrics or metrics["val/loss"] < self._metrics["val/loss"]
        if self.export == "last" or is_better:
            self._step, self._metrics, self._scored = trainer.global_step, metrics, scored

    def publish(self, step: int) -> None:
        """Write the samples and the plots and show them; what fails is told and left out.

        Args:
            step: Optimizer steps of the run.
        """
        if self._scored is None:
            return
        try:
            self._publish(self._scored, step)
        # The model is trained and not recorded yet: no picture is worth losing that.
        except Exception as error:
            logger.warning("the report on the validation is not complete: %s", error, exc_info=True)

    def _publish(self, scored: ScoredSplit, step: int) -> None:
        found = samples(self.groups(), scored)
        write_samples(self.folder / "samples.jsonl", found)
        drawn = draw(scored, self.folder / "plots", f"validation after step {self._step}")
        if self.view is None:
            return
        columns, rows = table(found, scored.names)
        self.view.log_table("samples", columns, rows, step)
        for path in drawn:
            self.view.log_image(f"plots/{path.stem}", path, step)
        figures = {f"exported/{name}": value for name, value in self._metrics.items()}
        self.view.summarise({"exported/step": self._step, **figures})


def samples(groups: Iterable[Group], scored: ScoredSplit) -> list[Sample]:
    """Put texts, ratings and predictions together.

    Args:
        groups: Groups of the split from its start; read as far as needed.
        scored: Scores of the split.

    Returns:
        A sample for each response of the first groups with scores, or one a group where it has one
        row.
    """
    found = []
    end = int(np.unique(scored.groups)[:SAMPLES][-1]) + 1
    for index, group in enumerate(islice(groups, end)):
        rows = np.flatnonzero(scored.groups == index)
        texts: Sequence[str] = group.responses
        if len(rows) == 1 and len(texts) > 1:
            texts = ["\n\n".join(f"{i}: {text}" for i, text in enumerate(texts, start=1))]
        prompt = "\n\n".join(f"{m['role']}: {m['content']}" for m in group.prompt)
        # A rank that had nothing left to score may have scored the first group once more.
        for text, row in zip(texts, rows, strict=False):
            rated = dict(zip(scored.names, scored.ratings[row].tolist(), strict=True))
            found.append(
                Sample(
                    group.id,
                    prompt,
                    text,
                    {name: None if value != value else value for name, value in rated.items()},
                    dict(zip(scored.names, scored.scores[row].tolist(), strict=True)),
                )
            )
    return found


def table(found: Sequence[Sample], names: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Samples as the columns and rows of a table.

    Args:
        found: The samples.
        names: Names of the scores.

    Returns:
        Names of the columns; rows of texts and numbers, None where a rating is unknown.
    """
    pairs = [(kind, name) for name in names for kind in ("rated", "predicted")]
    columns = ["id", "prompt", "response", *(f"{kind} {name}" for kind, name in pairs)]
    rows = [
        [s.id, s.prompt, s.response, *(getattr(s, kind)[name] for kind, name in pairs)]
        for s in found
    ]
    return columns, rows


def write_samples(path: Path, found: Iterable[Sample]) -> None:
    """Write samples as JSON lines, whole or not at all.

    Raises:
        UserError: If they cannot be written.
    """
    lines = "".join(json.dumps(vars(sample), ensure_ascii=False) + "\n" for sample in found)

    def write(file: Any) -> None:
        file.write(lines.encode("utf-8"))

    write_atomic(path, write)


def draw(scored: ScoredSplit, folder: Path, title: str) -> list[Path]:
    """Plot predictions against ratings.

    Args:
        scored: Scores of the split.
        folder: Where the files go.
        title: Stands above each plot.

    Returns:
        The files: none if nothing is rated.

    Raises:
        UserError: If they cannot be written.
    """
    columns: Mapping[str, tuple[np.ndarray, np.ndarray]] = {
        f"{name} ({scored.unit})": (scored.scores[:, i], scored.ratings[:, i])
        for i, name in enumerate(scored.names)
        if not np.isnan(scored.ratings[:, i]).all()
    }
    if not columns:
        return []
    bins = {name: statistics.calibration(*pair) for name, pair in columns.items()}
    figures = {
        "scatter": plots.scatter(columns, title=title),
        "calibration": plots.calibration(bins, title=title),
    }
    for name, figure in figures.items():
        plots.save(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]
