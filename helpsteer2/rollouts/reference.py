"""The policy that KL divergences are measured from, beside the one that trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from helpsteer2.errors import UserError
from helpsteer2.models.attention import AttentionChoice
from helpsteer2.models.lora import adapter_config, without_adapters
from helpsteer2.models.policy import Policy


class ReferencePolicy:
    """Where the policy started, or another policy of the same tokenizer and template.

    Args:
        start: The policy that trains, before its first step.
        path: Folder or Hub id of another one; None for ``start`` as it is. If that has adapters it
            is the policy without them, else a frozen copy.
        device: Where the policy will run.
        attention: Attention backend of another one.
        offload: Whether it waits on the CPU while it is not used.

    Raises:
        UserError: If the other one cannot be loaded, or its ids mean something else.
    """

    def __init__(
        self,
        start: Policy,
        path: str | None,
        device: torch.device | str,
        attention: AttentionChoice,
        offload: bool,
    ) -> None:
        self.offload, self.device = offload, device
        self.model: Policy | None = None
        if path is not None:
            half = start.lm_head.weight.dtype == torch.bfloat16
            dtype = "bfloat16" if half else "float32"
            self.model, _, chat = Policy.from_pretrained(path, dtype, attention)  # type: ignore[arg-type]
            if chat.ids_hash != start.spec.chat.ids_hash:
                raise UserError(
                    f"rollouts.reference={path} has another tokenizer or chat template than the "
                    "policy: their log-probabilities cannot be compared"
                )
        elif adapter_config(start.backbone) is None:
            self.model = copy.deepcopy(start)
        if self.model is not None:
            self.model.requires_grad_(False).eval()
            self.model.to("cpu" if offload else self.device)

    @contextmanager
    def ready(self, trained: Policy) -> Iterator[Policy]:
        """The reference on its device, for as long as the block lasts.

        Args:
            trained: The policy that trains, in eval mode; its adapters are away meanwhile, if it
                stands for the reference.
        """
        if self.model is None:
            with without_adapters(trained.backbone):
                yield trained
            return
        with on_device(self.model, self.device, self.offload):
            yield self.model


@contextmanager
def on_device(model: nn.Module | None, device: torch.device | str, offload: bool) -> Iterator[None]:
    """Have a model on its device for as long as the block lasts.

    Args:
        model: None for what is not in this process.
        device: Where it runs.
        offload: Whether it waits on the CPU before and after; else it is there already.
    """
    if model is None or not offload:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")
