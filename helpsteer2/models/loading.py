"""Reading a reward model: our exports, and the decoder classifiers of others.

Everything that could silently give wrong scores is refused here with what to do about it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.hub import hub_unreachable, require_hub
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.tokenizer import tokenizer_hash
from helpsteer2.errors import UserError
from helpsteer2.models.backbone import without_dropout, without_loading_report
from helpsteer2.models.export import check_pad_token, has_score_head, previous_folder
from helpsteer2.models.lora import ADAPTER_CONFIG, adapter_refusal
from helpsteer2.models.spec import SPEC_FILE, RewardSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HEAD_WEIGHT, HEAD_BIAS = "score.weight", "score.bias"
UNNAMED = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class LoadedReward:
    """The parts of a reward model on the CPU, checked against each other."""

    backbone: PreTrainedModel
    head: nn.Linear
    spec: RewardSpec
    tokenizer: PreTrainedTokenizerBase
    chat: BoundChat


@dataclass(frozen=True)
class RewardFolder:
    """A reward model on the disk: everything read and checked but the weights of its backbone.

    Attributes:
        folder: Where it lies.
        config: transformers' config, every dropout 0.
        head: fp32, on the CPU.
        spec: What the scores depend on beside the weights.
        tokenizer: The tokenizer.
        chat: The chat format bound to it.
    """

    folder: Path
    config: PreTrainedConfig
    head: nn.Linear
    spec: RewardSpec
    tokenizer: PreTrainedTokenizerBase
    chat: BoundChat

    def load(self, dtype: torch.dtype, implementation: str) -> LoadedReward:
        """Read the backbone's weights as well.

        Args:
            dtype: Of the backbone; the head is always fp32.
            implementation: Name of the attention implementation.

        Returns:
            The parts, with every dropout 0.

        Raises:
            UserError: If the weights are not those of the config, or of the tokenizer.
        """
        backbone = _backbone(self.folder, self.config, dtype, implementation)
        rows = backbone.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > rows:
            raise UserError(
                f"{self.folder}: {len(self.tokenizer)} tokens, but embeddings for {rows}: another "
                "tokenizer's"
            )
        return LoadedReward(backbone, self.head, self.spec, self.tokenizer, self.chat)


def open_reward(path: str | Path) -> RewardFolder:
    """Open a folder (or Hub id) of a reward model.

    Args:
        path: An export of ours, or any decoder sequence classifier of transformers.

    Raises:
        UserError: If the folder is no reward model that could be trusted to score right.
    """
    folder = local_folder(path)
    weights = WeightFiles(folder)
    config = _config(folder)
    spec = RewardSpec.read(folder)
    names = spec.attribute_names if spec else _label_names(config, folder)
    _check_labels(config, names, folder)
    _check_decoder(config, folder)
    head = _head(weights, len(names), config.get_text_config().hidden_size)
    tokenizer = load_tokenizer(folder)
    check_pad_token(config, tokenizer, str(folder))
    if spec is None:
        chat = ChatFormat().bind(tokenizer)
        spec = _foreign_spec(names, chat, tokenizer, config, folder)
    else:
        chat = checked_chat(spec, config, tokenizer, folder)
    return RewardFolder(folder, config, head, spec, tokenizer, chat)


def local_folder(path: str | Path, kind: str = "reward model") -> Path:
    """The folder of a model, fetched from the Hub if the path is a Hub id.

    Args:
        path: Folder or Hub id.
        kind: What is looked for, for the messages.

    Raises:
        UserError: If there is no such folder, and the Hub does not have it or is out of reach.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path} is a file; give the folder of a {kind}")
    previous = previous_folder(folder.resolve())
    if previous.is_dir():  # a save was killed between its two renames
        return previous
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise UserError(f"{path}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    what, here = (
        f"the {kind} {str(path)!r}",
        "give the path of a local folder (there is none of this name)",
    )
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model"]
    try:
        offline = hub_unreachable() is not None
        return Path(snapshot_download(str(path), allow_patterns=wanted, local_files_only=offline))
    except LocalEntryNotFoundError:
        require_hub(what, here)
        raise
    except HfHubHTTPError as error:
        raise UserError(f"cannot fetch {what}: {error}; {here}") from error


class WeightFiles:
    """The safetensors files of a folder: which tensor lies where."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        index = folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                self.files: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
                missing = sorted({f for f in self.files.values() if not (folder / f).is_file()})
                if missing:
                    raise UserError(f"{folder} lacks {', '.join(missing)}: copy the whole folder")
            elif (folder / "model.safetensors").is_file():
                with safe_open(folder / "model.safetensors", "pt") as file:
                    self.files = dict.fromkeys(file.keys(), "model.safetensors")
            else:
                raise UserError(_no_weights(folder))
        except (SafetensorError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{folder}: damaged weights ({error})") from error
        if HEAD_WEIGHT not in self.files:
            raise UserError(
                f"{folder} has no reward head ({HEAD_WEIGHT}): it is a language model or an "
                "encoder, and a head made on the spot would score at random; give a reward model"
            )

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in the type it has on the disk."""
        from safetensors import safe_open

        with safe_open(self.folder / self.files[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def read(self, name: str) -> torch.Tensor | None:
        """One tensor as fp32, or None."""
        return self.tensor(name).float() if name in self.files else None


def _no_weights(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.pt")):
        return (
            f"{folder} holds pickled weights only, which can run code: convert them to safetensors"
        )
    if (folder / ADAPTER_CONFIG).is_file():
        return adapter_refusal(folder)
    return f"{folder} is no model folder: it has no model.safetensors"


def _config(folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: config.json cannot be used: {error}") from error
    return without_dropout(config)


def _label_names(config: PreTrainedConfig, folder: Path) -> tuple[str, ...]:
    """Attribute names of a model that has no spec."""
    if config.num_labels == 1:
        return ("score",)
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    if any(UNNAMED.fullmatch(name) for name in names):
        raise UserError(
            f"{folder}: config.json has {len(names)} unnamed labels; a reward model has one label, "
            "or attribute names in id2label (2 unnamed labels are transformers' default for a head "
            "that was never set up)"
        )
    return names


def _check_labels(config: PreTrainedConfig, names: tuple[str, ...], folder: Path) -> None:
    labels = [str(config.id2label.get(i)) for i in range(config.num_labels)]
    if len(labels) != len(names) or (len(names) > 1 and tuple(labels) != names):
        raise UserError(
            f"{folder}: config.json has {len(labels)} labels ({', '.join(labels)}), {SPEC_FILE} "
            f"has {len(names)} ({', '.join(names)}): one of them belongs to another model"
        )


def _check_decoder(config: PreTrainedConfig, folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=False, attn_implementation="eager"
            )
    except ValueError as error:
        raise UserError(f"{folder}: transformers has no classifier for it: {error}") from error
    if not has_score_head(classifier):
        raise UserError(
            f"{folder}: {type(classifier).__name__} is no decoder with a linear `score` head; "
            "encoders such as BERT cannot be used"
        )


def _head(weights: WeightFiles, n_labels: int, hidden_size: int) -> nn.Linear:
    """The head as it lies on the disk: transformers would round it to the body's dtype."""
    weight, bias = weights.read(HEAD_WEIGHT), weights.read(HEAD_BIAS)
    assert weight is not None  # WeightFiles refused otherwise
    if tuple(weight.shape) != (n_labels, hidden_size):
        raise UserError(
            f"{weights.folder}: the head is {tuple(weight.shape)}, config.json wants "
            f"{(n_labels, hidden_size)}: weights and config belong to different models"
        )
    head = nn.Linear(hidden_size, n_labels, bias=bias is not None, device="meta")
    head.weight = nn.Parameter(weight)
    if bias is not None:
        head.bias = nn.Parameter(bias)
    return head


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a folder.

    Raises:
        UserError: If there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((folder / file).is_file() for file in files):
        raise UserError(f"{folder} has no tokenizer: copy the tokenizer's files there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: the tokenizer is not a fast one (no tokenizer.json)")
    return tokenizer


def checked_chat(
    spec: RewardSpec, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> BoundChat:
    """The chat format of an export, if tokenizer, template and pad token are the trained ones.

    Raises:
        UserError: If one of them is another.
    """
    if config.get_text_config().pad_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(
            f"{folder}: the pad token is gone from config.json or the tokenizer: export again"
        )
    chat = BoundChat(tokenizer, spec.template_name, spec.template_text, spec.system_prompt)
    changed = []
    if tokenizer_hash(tokenizer) != spec.tokenizer_hash:
        changed.append("tokenizer")
    # Text files may come back with other line ends.
    written = str(tokenizer.chat_template).replace("\r\n", "\n")
    same_text = written == spec.template_text.replace("\r\n", "\n")
    if not same_text or chat.template_hash != spec.template_hash:
        changed.append("chat template")
    if changed:
        raise UserError(
            f"{folder}: the {' and the '.join(changed)} changed since {SPEC_FILE} was written, so "
            "scores would not be those of the trained model: restore the files or export again"
        )
    return chat


def _foreign_spec(
    names: tuple[str, ...],
    chat: BoundChat,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    folder: Path,
) -> RewardSpec:
    """A spec for a model of others, whose limits share the positions it was built for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    limits = LengthLimits(positions - positions // 2, positions // 2)
    return RewardSpec.of(names, chat, tokenizer, limits, base_model=folder.name)


def _backbone(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, implementation: str
) -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification

    try:
        with without_loading_report():
            classifier, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=implementation,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # told below, all at once
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: the weights cannot be loaded: {error}") from error
    _check_loading(info, folder)
    backbone: PreTrainedModel = getattr(classifier, classifier.base_model_prefix)
    backbone.config.use_cache = False
    return backbone


def _check_loading(info: Mapping[str, Any], folder: Path) -> None:
    """Refuse a checkpoint that is not the config's: its holes would be filled at random."""
    ignored = (HEAD_BIAS, "lm_head.")  # the first is read apart, the second is of no use here
    kinds = {
        "missing": info["missing_keys"],
        "unknown": {key for key in info["unexpected_keys"] if not key.startswith(ignored)},
        "of another shape": {key[0] for key in info["mismatched_keys"]},
    }
    found = [
        f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{', …' if len(keys) > 3 else ''})"
        for kind, keys in kinds.items()
        if keys
    ]
    if found:
        raise UserError(
            f"{folder}: the weights are not those of config.json, tensors are {'; '.join(found)}: "
            "this is the checkpoint of another backbone"
        )
