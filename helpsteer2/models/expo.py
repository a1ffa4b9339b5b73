"""ExPO: a reward model extrapolated from the weights of two others, tensor by tensor."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from helpsteer2.errors import UserError
from helpsteer2.models.card import model_card
from helpsteer2.models.export import replaced_folder, share
from helpsteer2.models.loading import (
    HEAD_BIAS,
    HEAD_WEIGHT,
    RewardFolder,
    WeightFiles,
    open_reward,
)
from helpsteer2.models.spec import SPEC_FILE, Extrapolation, RewardSpec

INDEX_FILE = "model.safetensors.index.json"

_TOKENIZER_SUFFIXES = {".json", ".jinja", ".model", ".txt"}
_WRITTEN_HERE = {"config.json", INDEX_FILE, SPEC_FILE}
_HEAD = {HEAD_WEIGHT, HEAD_BIAS}
_FLOATS = {"F64", "F32", "BF16", "F16"}
_NO_PART_OF_THE_FUNCTION = {
    "_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class Parents:
    """Two stages of one reward model, checked against each other.

    Attributes:
        weak: The first stage, with all attributes of the second and maybe more.
        strong: The second one, trained from the first.
        weak_hash: SHA-256 of all tensors of the first stage, however they are cut into files.
        strong_hash: Likewise of the second.
    """

    weak: RewardFolder
    strong: RewardFolder
    weak_hash: str
    strong_hash: str

    @property
    def head_rows(self) -> list[int]:
        """Rows of the first stage's head that the second one started from, in its order."""
        names = self.weak.spec.attribute_names
        return [names.index(name) for name in self.strong.spec.attribute_names]


def extrapolate(weak: Tensor, strong: Tensor, alpha: float) -> Tensor:
    """Go from one tensor to another, and beyond.

    Args:
        weak: Where it starts.
        strong: Of the same shape; ``alpha`` 1.
        alpha: How far to go. The paper of ExPO counts from the strong model: its α is this minus 1.

    Returns:
        ``weak + alpha · (strong − weak)``, computed in fp32, in the wider of the two types: the
        very values of ``weak`` at 0 and of ``strong`` at 1.

    Source: arXiv 2404.16792; arXiv 2410.01257 for reward models.
    """
    # lerp starts at the nearer end, so rounding cannot spoil either of them.
    result = torch.lerp(weak.float(), strong.float(), alpha)
    return result.to(torch.promote_types(weak.dtype, strong.dtype))


def open_parents(weak: str | Path, strong: str | Path) -> Parents:
    """Open two exports and compare everything that must be equal; no weight is kept in memory.

    Args:
        weak: Folder or Hub id of the first stage.
        strong: Of the second.

    Returns:
        Both.

    Raises:
        UserError: If one is no export of ours, they differ in more than their weights (all
            differences are listed), or their weights do not differ at all.
    """
    first, second = open_reward(weak), open_reward(strong)
    for parent in (first, second):
        if RewardSpec.read(parent.folder) is None:
            raise UserError(
                f"{parent.folder} has no {SPEC_FILE}: both models have to be exports of helpsteer2"
            )
    found = _differences(first, second)
    if found:
        raise UserError(
            f"weak={weak} and strong={strong} are not two stages of one model:\n  "
            + "\n  ".join(found)
        )
    hashes = [weights_hash(WeightFiles(parent.folder)) for parent in (first, second)]
    if hashes[0] == hashes[1]:
        raise UserError(f"weak={weak} and strong={strong} have the very same weights")
    return Parents(first, second, *hashes)


def weights_hash(weights: WeightFiles) -> str:
    """SHA-256 of the names, types, shapes and values of all tensors."""
    hashed = hashlib.sha256()
    for name in sorted(weights.files):
        tensor = weights.tensor(name)
        hashed.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _differences(weak: RewardFolder, strong: RewardFolder) -> list[str]:
    """What tells two models apart beside the values of their weights."""
    found = []
    if weak.config.model_type != strong.config.model_type:
        found.append(f"architecture: {weak.config.model_type} and {strong.config.model_type}")
    else:
        found += _config_differences(weak.config.to_dict(), strong.config.to_dict())
        found += _tensor_differences(WeightFiles(weak.folder), WeightFiles(strong.folder))
    names, wanted = (parent.spec.attribute_names for parent in (weak, strong))
    if lacking := [name for name in wanted if name not in names]:
        found.append(f"attributes: weak has no {', '.join(lacking)}, only {', '.join(names)}")
    for what, key in (
        ("tokenizer", "tokenizer_hash"),
        ("chat template", "template_hash"),
        ("system prompt", "system_prompt"),
    ):
        values = [getattr(parent.spec, key) for parent in (weak, strong)]
        if values[0] != values[1]:
            found.append(f"{what}: {values[0]!r} and {values[1]!r}")
    return found


def _config_differences(weak: Mapping[str, object], strong: Mapping[str, object]) -> list[str]:
    # The labels are the attributes, which are told apart.
    left_out = _NO_PART_OF_THE_FUNCTION | {"id2label", "label2id"}
    keys = sorted((weak.keys() | strong.keys()) - left_out)
    return [
        f"config.json, {key}: {weak.get(key)!r} and {strong.get(key)!r}"
        for key in keys
        if weak.get(key) != strong.get(key)
    ]


def _tensor_differences(weak: WeightFiles, strong: WeightFiles) -> list[str]:
    """Tensors that one model lacks, that have two shapes, or that are no floating-point numbers."""
    left, right = _layout(weak), _layout(strong)
    found = {
        "only in weak": left.keys() - right.keys(),
        "only in strong": right.keys() - left.keys(),
        "of two shapes": {
            name
            # Rows of the heads belong to attributes, which are told apart.
            for name in (left.keys() & right.keys()) - _HEAD
            if left[name][1] != right[name][1]
        },
        "quantised or whole numbers": {
            name
            for name, (dtype, _) in itertools.chain(left.items(), right.items())
            if dtype not in _FLOATS
        },
    }
    return [
        f"tensors {kind}: {', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''}"
        for kind, names in found.items()
        if names
    ]


def _layout(weights: WeightFiles) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor, without reading any."""
    from safetensors import safe_open

    found = {}
    for file, names in _shards(weights).items():
        with safe_open(weights.folder / file, "pt") as opened:
            for name in names:
                view = opened.get_slice(name)
                found[name] = (view.get_dtype(), tuple(view.get_shape()))
    return found


def _shards(weights: WeightFiles) -> dict[str, list[str]]:
    """Names of the tensors in each file."""
    shards: dict[str, list[str]] = {}
    for name, file in sorted(weights.files.items()):
        shards.setdefault(file, []).append(name)
    return shards


def write_extrapolated(parents: Parents, alpha: float, folder: str | Path) -> None:
    """Write the extrapolated model as an export like any other.

    Tensors are read and computed one at a time; one file of the strong model (at most 5 GB as
    exports are written) is in memory. α and the hashes of both parents are in ``reward_model.json``
    and in the model card; everything else the folder says is the strong model's.

    Args:
        parents: The two models.
        alpha: How far to go from the weak one; finite.
        folder: Where to; an older export there is replaced at the end, or not at all.

    Raises:
        UserError: If ``alpha`` is not finite, the folder is one of the parents', it cannot be
            written, or a weight is no longer finite.
    """
    if not abs(alpha) <= torch.finfo(torch.float32).max:  # False for NaN
        raise UserError(f"alpha has to be a finite number, got {alpha}")
    weak, strong = parents.weak, parents.strong
    if Path(folder).resolve() in {weak.folder.resolve(), strong.folder.resolve()}:
        raise UserError(f"{folder} is one of the two models: choose another run_dir")
    with replaced_folder(folder, SPEC_FILE) as aside:
        size = _write_weights(parents, alpha, aside)
        for path in strong.folder.iterdir():
            if path.suffix in _TOKENIZER_SUFFIXES and path.name not in _WRITTEN_HERE:
                shutil.copyfile(path, aside / path.name)
        made = Extrapolation(float(alpha), parents.weak_hash, parents.strong_hash)
        spec = replace(strong.spec, extrapolation=made)
        spec.write(aside)
        class_name = (strong.config.architectures or ["unknown"])[0]
        card = model_card(spec, class_name, size, strong.chat.adds_bos)
        (aside / "README.md").write_text(card, encoding="utf-8")
        share(aside)


def _write_weights(parents: Parents, alpha: float, aside: Path) -> int:
    """Write weights, their index and the config; the number of parameters."""
    from safetensors.torch import save_file

    weak, strong = WeightFiles(parents.weak.folder), WeightFiles(parents.strong.folder)
    n_parameters = n_bytes = 0
    dtype = torch.float32  # of the backbone
    for file, names in _shards(strong).items():
        tensors = {}
        for name in names:
            start = weak.tensor(name)
            if name in _HEAD:
                start = start[parents.head_rows]
            tensor = extrapolate(start, strong.tensor(name), alpha)
            if not torch.isfinite(tensor).all():
                raise UserError(f"{name} is not finite at alpha={alpha:g}: choose a smaller alpha")
            tensors[name] = tensor
            n_parameters += tensor.numel()
            n_bytes += tensor.nbytes
            if name not in _HEAD:
                dtype = tensor.dtype
        save_file(tensors, aside / file, metadata={"format": "pt"})
    index = strong.folder / INDEX_FILE
    if index.is_file():
        content = json.loads(index.read_text("utf-8"))
        content["metadata"] = {**content.get("metadata", {}), "total_size": n_bytes}
        _write_json(aside / INDEX_FILE, content)
    config = json.loads((strong.folder / "config.json").read_text("utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(aside / "config.json", config)
    return n_parameters


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
