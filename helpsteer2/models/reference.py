"""Log-probabilities of a policy that does not train, for the losses that compare with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from helpsteer2.data.packing import pack
from helpsteer2.data.planner import consecutive_bins
from helpsteer2.data.reference import ReferenceSplit
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.errors import UserError
from helpsteer2.models.loading import local_folder
from helpsteer2.models.policy import Policy


def reference_split(
    policy: Policy,
    groups: TokenisedGroups,
    tokens_per_microbatch: int,
    autocast: torch.dtype | None = None,
    advance: Callable[[int], object] = lambda n: None,
) -> ReferenceSplit:
    """Log-probability of every response token of a split.

    No gradient is kept, logits exist a chunk of tokens at a time, and nothing random is drawn. What
    a response gets depends on its own group alone, but for rounding.

    Args:
        policy: The policy, on its device and in eval mode.
        groups: The split.
        tokens_per_microbatch: Tokens of one forward pass; a longer group gets a pass of its own.
        autocast: What matrix products compute in, as training does under ``bf16-mixed``; None for
            the type of the weights.
        advance: Told the number of groups after every pass.

    Returns:
        The log-probabilities, in the order of the groups.

    Raises:
        UserError: If the device's memory is too small, or a log-probability is not finite.
    """
    device = policy.lm_head.weight.device
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    for members in consecutive_bins(groups.lengths, tokens_per_microbatch):
        batch = pack([groups[i] for i in members])
        try:
            with (
                torch.inference_mode(),
                torch.autocast(device.type, autocast, enabled=autocast is not None),
            ):
                logprobs = policy.response_logprobs(batch.to(device)).logprobs.cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory with {batch.layout.n_tokens} tokens in one pass (budget "
                f"{tokens_per_microbatch}): lower tokens_per_microbatch"
            ) from error
        if not np.isfinite(logprobs).all():
            raise UserError(
                f"the policy gives a log-probability that is not finite, in groups "
                f"{groups.ids[members[0]]!r} … {groups.ids[members[-1]]!r}: its weights are broken"
            )
        parts.append(logprobs)
        lengths += [length for group in batch.layout.response_lengths for length in group]
        advance(len(members))
    return ReferenceSplit(np.concatenate(parts), np.array(lengths, np.int32))


def policy_hash(path: str | Path) -> str:
    """SHA-256 of a model's weights as they lie on the disk, however they are cut into files.

    Args:
        path: Folder or Hub id.

    Raises:
        UserError: If there are none, or they cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    folder = local_folder(path, "policy")
    hashed = hashlib.sha256()
    try:
        files = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                files.update(dict.fromkeys(opened.keys(), file))
        for name in sorted(files):
            with safe_open(files[name], "pt") as opened:
                tensor = opened.get_tensor(name)
            hashed.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
            hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged weights ({error})") from error
    if not files:
        raise UserError(f"{folder} is no model folder: it has no safetensors")
    return hashed.hexdigest()
