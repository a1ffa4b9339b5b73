"""One optimizer step from a list of micro-batches, exact whatever their number and size."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from helpsteer2.data.groups import GroupSource
from helpsteer2.data.packing import PackedBatch
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.errors import UserError
from helpsteer2.functional.autocast import cached_casts
from helpsteer2.models.lora import frozen_fingerprint
from helpsteer2.modules.scored import ScoredSplit
from helpsteer2.modules.validation import gather_split

if TYPE_CHECKING:
    from helpsteer2.models.policy import Policy
    from helpsteer2.models.reward import RewardModel

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
Decay = Literal["constant", "linear"]


class NonFiniteError(UserError):
    """The loss or the gradient is NaN or infinite, so the run must not go on.

    Attributes:
        step: 0-based optimizer step that failed; its update was not applied.
        batch_file: Where the step's batch was saved, None if it was not.
    """

    def __init__(self, step: int, loss: float, gradient_norm: float) -> None:
        self.step, self.batch_file = step, cast("Path | None", None)
        super().__init__(
            f"step {step} gave a loss of {loss} and a gradient norm of {gradient_norm}. Training "
            "stopped before this update; the last checkpoint holds finite weights"
        )

    def __str__(self) -> str:
        """Say where the batch is, and what usually helps."""
        saved = f" The batch is in {self.batch_file}." if self.batch_file else ""
        return (
            f"{super().__str__()}.{saved} The same command would resume and meet the same step: "
            "try a lower learning rate or trainer.precision=32-true in a new run_dir, or look at "
            "that batch."
        )


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not.

    Parameters with one dimension (biases, norms) do not decay; matrices do, embeddings included, as
    in Megatron, on which the paper's code runs.

    Args:
        module: Holds the parameters; frozen ones are left out.

    Returns:
        At most two parameter groups, none empty; the first takes the optimizer's own decay.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2]},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def rate_factor(step: int, warmup_steps: int, decay: Decay, total_steps: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then constant or decaying.

    Args:
        step: 0-based optimizer step.
        warmup_steps: Steps until the full rate; 0 and 1 start with it.
        decay: ``constant`` after the warm-up, or ``linear`` towards 0 after the last step.
        total_steps: Steps of the run.

    Returns:
        ``min(1, (step + 1) / warmup_steps)``, times ``1 − step / total_steps`` if it decays.
    """
    factor = min(1.0, (step + 1) / max(warmup_steps, 1))
    return factor if decay == "constant" else factor * max(0.0, 1.0 - step / total_steps)


def clip_norm(module: nn.Module, largest: float | None) -> float:
    """Clip the norm of a module's gradients, all of them together.

    Args:
        module: Its parameters without a gradient are left out.
        largest: Norm that is left at the most; None does not clip.

    Returns:
        The norm before.
    """
    gradients = [p for p in module.parameters() if p.grad is not None]
    return float(nn.utils.clip_grad_norm_(gradients, math.inf if largest is None else largest))


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Keep weights that do not train out of checkpoints: they lie where they came from."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def _miss_no_frozen(module: nn.Module, keys: Any) -> None:
    """The other side: a checkpoint without them is whole."""
    frozen = {n for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]


class StepModule(pl.LightningModule):
    """A LightningModule whose ``training_step`` is one optimizer step.

    It receives the micro-batches of the step as a list, runs backward on each loss sum over the
    count of the *whole* step (all micro-batches, all ranks), and steps once. So the update does not
    depend on how the step was cut. Lightning counts one ``global_step`` a step, because there is
    exactly one optimizer. Under ``bf16-mixed`` the weights are cast once a step, not once a
    micro-batch.

    Subclasses say what to count, what the loss sums are, what to log, and what to keep of a
    validation batch and to compute from the whole split.

    Args:
        model: What is trained and exported.
        optimizer: Makes the optimizer from parameter groups.
        warmup_steps: Step s (0-based) runs at ``lr · min(1, (s + 1) / warmup_steps)``.
        decay: What the learning rate does after that: ``constant``, or ``linear`` to 0 at the end.
        gradient_clip: Largest gradient norm, over all parameters together; None does not clip.
    """

    model: RewardModel | Policy
    """What is trained and exported."""

    objective: str
    """The loss in words, for the model card."""

    loss_names: ClassVar[tuple[str, ...]] = ()
    """Names of the loss terms, each logged apart as ``train/NAME``; none logs their sum alone."""

    needs_reference: ClassVar[bool] = False
    """Whether the loss reads log-probabilities of a reference policy."""

    scored: ScoredSplit | None = None
    """Scores and labels of the latest validation; None if there is nothing to show."""

    def __init__(
        self,
        model: RewardModel | Policy,
        *,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        decay: Decay,
        gradient_clip: float | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.automatic_optimization = False
        self.make_optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.decay: Decay = decay
        self.gradient_clip = gradient_clip
        self.groups_seen = 0
        self.tokens_seen = 0
        self._seed = torch.initial_seed()
        self._validated: list[tuple[Tensor, ...]] = []
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_post_hook(_miss_no_frozen)

    @classmethod
    def check_source(cls, source: GroupSource, attribute_names: Sequence[str]) -> None:
        """Refuse data that cannot hold what the objective learns from, before they are tokenised.

        Args:
            source: Where the splits are read.
            attribute_names: Names of the model's scores.

        Raises:
            UserError: If they cannot.
        """

    @classmethod
    def usable(cls, groups: TokenisedGroups, split: str) -> TokenisedGroups:
        """The groups of a split that the objective can use: all of them, unless it chooses.

        Asked before the model is built.

        Args:
            groups: The split.
            split: ``train`` or ``validation``.

        Raises:
            UserError: If there is nothing to learn from them, or to measure.
        """
        return groups

    @abstractmethod
    def count(self, batch: PackedBatch) -> Tensor:
        """Denominators of the loss terms, known before any forward: ``(K,)`` int64."""

    @abstractmethod
    def loss_sums(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Run the model: loss sums ``(K,)`` and detached sums to log ``(S,)``, both float32."""

    @abstractmethod
    def step_metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Metrics from the logged sums ``(S,)`` over the whole step of all ranks."""

    @abstractmethod
    def validation_columns(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """What validation keeps of a batch: the ``(N,)`` index of each row's group, other columns.

        Args:
            batch: Of the validation split.
        """

    @abstractmethod
    def validation_metrics(self, groups: np.ndarray, *columns: np.ndarray) -> dict[str, float]:
        """Metrics of the whole split, ``val/loss`` among them.

        Args:
            groups: ``(N,)`` index of each row's group, of all ranks, in the order of the data.
            *columns: The other columns, in the same order.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer trains; a group may have settings of its own."""
        return decay_groups(self)

    def rate_factor(self, group: dict[str, Any], step: int) -> float:
        """Share of its learning rate that a parameter group has at a 0-based step."""
        return rate_factor(step, self.warmup_steps, self.decay, self.trainer.max_steps)

    def clip_gradients_of_step(self) -> dict[str, float]:
        """Clip the gradients of the whole step; their norms before, as metrics.

        The first one tells whether the step may be made: it is not finite if a gradient is not.
        """
        return {"train/grad_norm": clip_norm(self, self.gradient_clip)}

    def update(self, optimizer: Optimizer) -> None:
        """Make the step."""
        optimizer.step()

    def configure_optimizers(self) -> dict[str, Any]:
        """One optimizer over the parameter groups, and their schedules."""
        optimizer = self.make_optimizer(self.parameter_groups())
        factors: list[Callable[[int], float]] = [
            partial(self.rate_factor, group) for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, factors)}

    def on_fit_start(self) -> None:
        """Switch to training mode: ``from_pretrained`` gives eval, and Lightning keeps it."""
        self.train()

    def training_step(self, batches: list[PackedBatch], batch_idx: int) -> dict[str, Any]:
        """Run one optimizer step.

        Args:
            batches: This rank's micro-batches; every rank has the same number.
            batch_idx: Not used; ``global_step`` is the number of the step.

        Returns:
            ``metrics``: name → number, of the whole step over all ranks.

        Raises:
            NonFiniteError: If the loss or the gradient norm is not finite; no update is made.
        """
        step = self.global_step
        # What a step draws (dropout of adapters) is the same in a run that goes on from here.
        seeds = np.random.SeedSequence((self._seed, step, self.global_rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        optimizer = cast("pl.core.optimizer.LightningOptimizer", self.optimizers())
        counts = torch.stack([self.count(batch).reshape(-1) for batch in batches])
        total = self._sum_over_ranks(counts.sum(dim=0)).clamp(min=1)
        optimizer.zero_grad()
        sums = self._backward(batches, total)
        norms = self.clip_gradients_of_step()
        real = [batch for batch in batches if not batch.filler]
        seen = [sum(len(b.group_indices) for b in real), sum(b.layout.n_tokens for b in real)]
        groups, tokens = self._sum_over_ranks(torch.tensor(seen, device=self.device)).tolist()
        k = len(total)
        terms = sums[:k] / total
        loss = float(terms.sum())
        if not (torch.isfinite(sums).all() and all(map(math.isfinite, norms.values()))):
            raise NonFiniteError(step, loss, next(iter(norms.values())))
        lr = float(optimizer.param_groups[0]["lr"])
        self.update(optimizer)
        cast("LambdaLR", self.lr_schedulers()).step()
        self.groups_seen += groups
        self.tokens_seen += tokens
        return {
            "metrics": {
                "train/loss": loss,
                **norms,
                "lr": lr,
                "groups_seen": self.groups_seen,
                "tokens_seen": self.tokens_seen,
                **{f"train/{n}": v for n, v in zip(self.loss_names, terms.tolist(), strict=False)},
                **self.step_metrics(sums[k:].tolist()),
            }
        }

    def _backward(self, batches: list[PackedBatch], total: Tensor) -> Tensor:
        """Run forward and backward on every micro-batch; sums over all of them and all ranks."""
        all_sums = []
        with cached_casts(self.device.type):
            for i, batch in enumerate(batches):
                last = i == len(batches) - 1
                with contextlib.nullcontext() if last else self._no_gradient_sync():
                    sums, logged = self.loss_sums(batch)
                    # DDP averages the ranks' gradients, the loss needs their sum.
                    loss = (sums / total).sum() * self.trainer.world_size
                    # Backward of a layer that left autocast would otherwise run in bf16.
                    with torch.autocast(self.device.type, enabled=False):
                        self.manual_backward(loss)
                all_sums.append(torch.cat([sums.detach().reshape(-1), logged.reshape(-1)]))
        return self._sum_over_ranks(torch.stack(all_sums).sum(dim=0))

    def _no_gradient_sync(self) -> AbstractContextManager[None]:
        strategy = self.trainer.strategy
        if isinstance(strategy, ParallelStrategy):
            return cast("AbstractContextManager[None]", strategy.block_backward_sync())
        return contextlib.nullcontext()

    def on_validation_epoch_start(self) -> None:
        """Start with no rows."""
        self._validated = []

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Keep what the metrics of the split need of a packed batch."""
        self._validated.append(tuple(column.cpu() for column in self.validation_columns(batch)))

    def on_validation_epoch_end(self) -> None:
        """Gather every rank's rows and log the metrics of the split."""
        columns = gather_split(self._validated, self.trainer)
        self._validated = []
        # The record is written by callbacks; this makes it known to Lightning's own ones.
        self.log_dict(self.validation_metrics(*columns), logger=False, sync_dist=False)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            dist.all_reduce(values)
        return values

    @cached_property
    def _frozen(self) -> str | None:
        """Fingerprint of the weights that do not train, and hence are in no checkpoint."""
        return frozen_fingerprint(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was seen, as plain numbers (``weights_only`` loading takes nothing else)."""
        checkpoint["seen"] = {"groups": self.groups_seen, "tokens": self.tokens_seen}
        checkpoint["frozen"] = self._frozen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting where the checkpoint stopped.

        Raises:
            UserError: If the weights that do not train are others now.
        """
        if checkpoint.get("frozen") != self._frozen:
            raise UserError(
                "the checkpoint holds what was trained beside other frozen weights: backbone.path "
                "is not the model any more that this run began with; start in another run_dir"
            )
        seen = checkpoint["seen"]
        self.groups_seen, self.tokens_seen = seen["groups"], seen["tokens"]
