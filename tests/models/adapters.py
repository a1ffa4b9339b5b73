"""What tests of adapters share."""

from __future__ import annotations

import torch
from torch import nn


def wake(model: nn.Module) -> None:
    """Make adapters do something: B begins as zero."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2)
