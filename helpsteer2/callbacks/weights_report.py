"""How the weights that SteerLM 2.0 learns are distributed, seen before the first step."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytorch_lightning as pl

from helpsteer2 import plots
from helpsteer2.callbacks.wandb import WandbView
from helpsteer2.data.datamodule import GroupDataModule
from helpsteer2.modules.steerlm2 import SteerLM2Module
from helpsteer2.rewards.weighing import ImportanceTerms

logger = logging.getLogger(__name__)


class WeightsReport(pl.Callback):
    """Draws ``plots/weights.png`` for trainings of ``SteerLM2Module``, and shows it on W&B.

    Args:
        folder: The run's folder.
        view: The W&B run, if there is one.
    """

    def __init__(self, folder: Path, view: WandbView | None) -> None:
        self.path = folder / "plots" / "weights.png"
        self.view = view

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw; what fails is told and left out: no picture is worth losing a training."""
        data = getattr(trainer, "datamodule", None)
        if not (isinstance(pl_module, SteerLM2Module) and isinstance(data, GroupDataModule)):
            return
        if not trainer.is_global_zero:
            return
        try:
            self._draw(data)
        except Exception as error:
            logger.warning("the weights could not be drawn: %s", error, exc_info=True)

    def _draw(self, data: GroupDataModule) -> None:
        groups = data.train
        # Which part of the target is label and which prior makes no difference to the weights.
        targets = groups.rewards.astype(np.float64)
        terms = ImportanceTerms(
            label=targets,
            prior=np.zeros_like(targets),
            proposal=groups.ref_logprobs.astype(np.float64),
            n_responses=groups.n_responses,
        )
        columns = {
            "weight of a response": np.exp(terms.log_weights).tolist(),
            "effective samples of a prompt": terms.effective_samples.tolist(),
        }
        title = f"weights that are learned: {len(groups):,} prompts"
        plots.save(plots.histograms(columns, title=title), self.path)
        if self.view is not None:
            self.view.log_image("plots/weights", self.path, 0)
