"""The backbone: a transformers decoder, with or without LM head, set up for packed batches."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from helpsteer2.data.hub import hub_unreachable, require_hub
from helpsteer2.data.tokenizer import PretrainedTokenizer, TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.attention import (
    AttentionChoice,
    check_architecture,
    check_packable,
    choose_backend,
    implementation_name,
)
from helpsteer2.models.lora import Lora, adapter_refusal, is_adapter

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
        dtype: Type of the weights. ``float32`` is right for weights that train: bf16 ones absorb
            small learning rates whole. Frozen ones, beside adapters, may be bf16.
        attention: Backend of packed attention.
        gradient_checkpointing: Recompute each layer in the backward pass, for memory.
        trust_remote_code: Run code from the model's folder. Off for good reason.
        lora: Freeze the weights and train adapters beside them; None trains the weights.
    """

    tokenizer: PretrainedTokenizer | TrainedTokenizer
    path: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    config: Mapping[str, Any] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: AttentionChoice = "auto"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    lora: Lora | None = None

    def build(
        self,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        lm_head: bool = False,
    ) -> PreTrainedModel:
        """Load or draw the weights.

        Args:
            tokenizer: Built from ``self.tokenizer``; its vocabulary must fit the embedding.
            seed: Seed of random weights.
            device: Where the model will run, for the choice of the attention backend. The weights
                are made on the CPU.
            autocast: What autocast will compute in, for the same choice; None without it.
            lm_head: Whether to give the causal LM around the decoder, its LM head with it.

        Returns:
            The decoder without LM head, or the causal LM, in train mode, dropout 0.

        Raises:
            UserError: If the model cannot be found or packed, or does not fit the tokenizer.
        """
        from transformers import AutoModel, AutoModelForCausalLM

        implementation = self.implementation(device, autocast)
        if self.init == "random":
            config = self._config(tokenizer)
            factory = AutoModelForCausalLM if lm_head else AutoModel
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                # Without a dtype it takes that of the config of ``path``.
                model = factory.from_config(
                    config, dtype=self.weights_dtype, attn_implementation=implementation
                )
        else:
            model = self._pretrained(implementation, lm_head)
        unchanged = self.init == "pretrained" and not self.config
        base = self.path if unchanged else None
        self.prepare(model.base_model if lm_head else model, tokenizer, seed, base)
        if lm_head and self.lora is not None:
            model.get_output_embeddings().requires_grad_(False)
        return model.train()

    @property
    def weights_dtype(self) -> torch.dtype:
        """Type of the trained weights."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def implementation(self, device: torch.device | str, autocast: torch.dtype | None) -> str:
        """Name of the attention implementation; arguments as in ``build``."""
        backend = choose_backend(self.attention, device, autocast or self.weights_dtype)
        return implementation_name(backend)

    def prepare(
        self,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        base: str | None,
    ) -> None:
        """Set a decoder up for training as asked, wherever its weights came from.

        Args:
            decoder: Without LM head, every dropout 0.
            tokenizer: Its vocabulary must fit the embedding.
            seed: Seed of new adapters, if there are to be any.
            base: Folder or Hub id that holds exactly these weights, None if there is none.

        Raises:
            UserError: If the decoder cannot be packed, or does not fit the tokenizer.
        """
        check_packable(decoder)
        self._check_vocabulary(decoder, tokenizer)
        if self.lora is not None:
            self.lora.inject(decoder, seed, base)
        if self.gradient_checkpointing:
            decoder.gradient_checkpointing_enable({"use_reentrant": False})
        decoder.train()

    def _config(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
        """The config of random weights, with the tokenizer's special ids."""
        from transformers import AutoConfig

        changes = dict(self.config or {})
        if self.path is not None:
            config = self._from_path(AutoConfig, self.path, **changes)
        elif "model_type" in changes:
            self._check_keys(changes)
            changes.setdefault("vocab_size", len(tokenizer))
            config = AutoConfig.for_model(**changes)
        else:
            raise UserError(
                "backbone: init=random needs backbone.path or a backbone.config with model_type"
            )
        check_architecture(config)
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        return without_dropout(config)

    def _pretrained(self, implementation: str, lm_head: bool) -> PreTrainedModel:
        from transformers import AutoConfig, AutoModelForCausalLM

        if self.path is None:
            raise UserError("backbone: init=pretrained needs backbone.path (a folder or a Hub id)")
        config = self._from_path(AutoConfig, self.path, **dict(self.config or {}))
        check_architecture(config)
        self._check_targets(config)
        # As a causal LM: a checkpoint with tied weights may hold the embedding as its LM head only.
        with without_loading_report():
            model, info = self._from_path(
                AutoModelForCausalLM,
                self.path,
                config=without_dropout(config),
                dtype=self.weights_dtype,
                attn_implementation=implementation,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # told below, all at once
                output_loading_info=True,
            )
        missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
        holes = sorted(name for name in missing if lm_head or not name.startswith("lm_head."))
        if holes:
            raise UserError(
                f"the backbone {self.path!r} lacks weights of {type(model).__name__}, or has them "
                f"in another shape: {', '.join(holes[:5])}{' …' if len(holes) > 5 else ''}: this "
                "is the checkpoint of another backbone"
            )
        return model if lm_head else model.base_model  # type: ignore[no-any-return]

    def _check_targets(self, config: PreTrainedConfig) -> None:
        """Refuse a misspelt layer before the weights are read."""
        from transformers import AutoModel

        if self.lora is None:
            return
        with torch.device("meta"):
            skeleton = AutoModel.from_config(
                config, trust_remote_code=self.trust_remote_code, attn_implementation="eager"
            )
        self.lora.targets(skeleton)

    def _from_path(self, factory: Any, path: str, **options: Any) -> Any:
        """``from_pretrained`` from a folder, the Hub, or the Hub's cache if it is out of reach."""
        from safetensors import SafetensorError

        folder = Path(path).expanduser()
        local = folder.is_dir()
        if not local and folder.is_absolute():
            raise UserError(f"the backbone {path!r} cannot be loaded: there is no such folder")
        if is_adapter(folder):
            raise UserError(adapter_refusal(folder))
        offline = not local and hub_unreachable() is not None
        try:
            return factory.from_pretrained(
                str(folder) if local else path,
                local_files_only=local or offline,
                trust_remote_code=self.trust_remote_code,
                **options,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if offline:
                # Not by the name of a setting: commands that only read a model have none for it.
                require_hub(
                    f"the backbone {path!r}", "give a local folder of a transformers causal LM"
                )
            raise UserError(f"the backbone {path!r} cannot be loaded: {error}") from error

    @staticmethod
    def _check_keys(changes: Mapping[str, Any]) -> None:
        """Refuse a misspelt key: transformers would keep it and train the default size."""
        from transformers import AutoConfig

        try:
            known = set(AutoConfig.for_model(changes["model_type"]).to_dict())
        except ValueError as error:
            raise UserError(
                f"backbone.config.model_type={changes['model_type']}: {error}"
            ) from error
        known |= {"model_type", "rope_theta", "rope_scaling"}  # the older names of rope_parameters
        for key in changes:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(
                    f"backbone.config.{key} is unknown to {changes['model_type']}{hint}"
                )

    @staticmethod
    def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        rows = model.get_input_embeddings().num_embeddings
        needed = len(tokenizer)
        if needed > rows:
            raise UserError(
                f"the tokenizer has {needed} tokens, the backbone embeds {rows}: they do not "
                "belong together"
            )


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Leave nothing to chance: steps have to be exact, and the packed kernels have no dropout.

    Args:
        config: Changed in place: every dropout, layer drop and router noise becomes 0.

    Returns:
        The same config.
    """
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if isinstance(value, float) and re.search("dropout|pdrop|layerdrop|jitter", name):
                setattr(part, name, 0.0)
    return config


@contextmanager
def without_loading_report() -> Iterator[None]:
    """Keep transformers from printing a table of wrong tensors: the error names them."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    # Not by its level: transformers reads that, and warns of other things at a higher one.
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
