"""The backbone: a transformers decoder without its LM head, set up for packed batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from helpsteer2.data.hub import hub_unreachable, require_hub
from helpsteer2.data.tokenizer import PretrainedTokenizer, TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.attention import (
    AttentionChoice,
    check_packable,
    choose_backend,
    implementation_name,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Backbone:
    """What the backbone is and how it is loaded; nothing is loaded before ``build``.

    Args:
        tokenizer: The backbone's own tokenizer, or one trained on the data (random init only).
        path: Folder or Hub id of a transformers causal LM; None if ``config`` tells everything.
        init: ``pretrained`` loads the weights of ``path``; ``random`` draws them.
        config: Values of the transformers config for ``random`` without ``path`` (``model_type``
            and sizes), or changes to the config of ``path``.
        dtype: Type of the trained weights. ``float32`` is right for training: bf16 weights absorb
            small learning rates whole.
        attention: Backend of packed attention.
        gradient_checkpointing: Recompute each layer in the backward pass, for memory.
        trust_remote_code: Run code from the model's folder. Off for good reason.
    """

    tokenizer: PretrainedTokenizer | TrainedTokenizer
    path: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    config: Mapping[str, Any] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: AttentionChoice = "auto"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False

    def build(
        self, tokenizer: PreTrainedTokenizerFast, seed: int, device: torch.device | str = "cpu"
    ) -> PreTrainedModel:
        """Load or draw the weights.

        Args:
            tokenizer: Built from ``self.tokenizer``; its vocabulary must fit the embedding.
            seed: Seed of random weights.
            device: Where the model will run, for the choice of the attention backend. The weights
                are made on the CPU.

        Returns:
            The decoder without LM head, in train mode, dropout 0.

        Raises:
            UserError: If the model cannot be found or packed, or does not fit the tokenizer.
        """
        from transformers import AutoModel

        backend = choose_backend(self.attention, device)
        implementation = implementation_name(backend)
        dtype = getattr(torch, self.dtype)
        if self.init == "random":
            config = self._config(tokenizer)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = AutoModel.from_config(config, attn_implementation=implementation)
            model.to(dtype)
        else:
            model = self._pretrained(implementation, dtype)
        check_packable(model)
        self._check_vocabulary(model, tokenizer)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        return model

    def _config(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
        """The config of random weights, with the tokenizer's special ids."""
        from transformers import AutoConfig

        changes = dict(self.config or {})
        if self.path is not None:
            config = self._from_path(AutoConfig, self.path, **changes)
        elif "model_type" in changes:
            changes.setdefault("vocab_size", len(tokenizer))
            config = AutoConfig.for_model(**changes)
        else:
            raise UserError(
                "backbone: init=random needs backbone.path or a backbone.config with model_type"
            )
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        return _without_dropout(config)

    def _pretrained(self, implementation: str, dtype: torch.dtype) -> PreTrainedModel:
        from transformers import AutoConfig, AutoModelForCausalLM

        if self.path is None:
            raise UserError("backbone: init=pretrained needs backbone.path (a folder or a Hub id)")
        config = self._from_path(AutoConfig, self.path, **dict(self.config or {}))
        # As a causal LM: a checkpoint with tied weights may hold the embedding as its LM head only.
        model, info = self._from_path(
            AutoModelForCausalLM,
            self.path,
            config=_without_dropout(config),
            dtype=dtype,
            attn_implementation=implementation,
            use_safetensors=True,
            output_loading_info=True,
        )
        missing = [*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])]
        holes = sorted(name for name in missing if not name.startswith("lm_head."))
        if holes:
            raise UserError(
                f"backbone.path={self.path} lacks weights of {type(model).__name__}: "
                f"{', '.join(holes[:5])}{' …' if len(holes) > 5 else ''}"
            )
        return model.base_model  # type: ignore[no-any-return]

    def _from_path(self, factory: Any, path: str, **options: Any) -> Any:
        """``from_pretrained`` from a folder, the Hub, or the Hub's cache if it is out of reach."""
        folder = Path(path).expanduser()
        local = folder.is_dir()
        offline = not local and hub_unreachable() is not None
        try:
            return factory.from_pretrained(
                str(folder) if local else path,
                local_files_only=local or offline,
                trust_remote_code=self.trust_remote_code,
                **options,
            )
        except (OSError, ValueError) as error:
            if offline:
                require_hub(
                    f"the backbone {path!r}",
                    "set backbone=local backbone.path=DIR (a folder of a transformers causal LM)",
                )
            raise UserError(f"backbone.path={path}: cannot be loaded: {error}") from error

    @staticmethod
    def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        rows = model.get_input_embeddings().num_embeddings
        needed = len(tokenizer)
        if needed > rows:
            raise UserError(
                f"the tokenizer has {needed} tokens, the backbone embeds {rows}: they do not "
                "belong together"
            )


def _without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Dropout off: the packed kernels have none, and steps have to be exact."""
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if getattr(config, name, 0):
            setattr(config, name, 0.0)
    return config
