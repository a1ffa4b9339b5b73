"""Tokenizers: a pretrained one, or one trained on the spot, always with a pad token of its own."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.hub import hub_unreachable, require_hub
from helpsteer2.data.templates import shipped_template
from helpsteer2.data.text_encoder import tokenizer_parts
from helpsteer2.errors import UserError
from helpsteer2.records import write_atomic

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

Texts = Callable[[], Iterator[str]]
"""Gives the training texts anew at each call."""

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
"""Special tokens of a trained tokenizer, ids 0 to 5."""

KNOWN_PAD_TOKENS = (
    "<|finetune_right_pad_id|>",  # Llama 3.1 and later
    "<|reserved_special_token_0|>",  # Llama 3
    "<|fim_pad|>",  # Qwen 2.5 and 3, base models
    "<|vision_pad|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|endoftext|>",
    "<unk>",
)
"""Tokens that no chat writes, in order of preference: for tokenizers that pad with EOS."""

WORD_COUNT = 1000
"""How often each of the words wanted is put into the training texts."""

_SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class PretrainedTokenizer:
    """The tokenizer of a pretrained model.

    Its embeddings are never resized: the pad token is one that the vocabulary already has.

    Args:
        path: A local folder, or an id on the Hugging Face Hub.
        pad_token: Pad token to use instead of the tokenizer's own.
    """

    path: str
    pad_token: str | None = None

    def build(self, texts: Texts, cache_dir: str | Path) -> PreTrainedTokenizerFast:
        """Load the tokenizer.

        Args:
            texts: Not used.
            cache_dir: Not used: the Hub's client has its own cache.

        Returns:
            A fast tokenizer whose pad token is neither EOS nor closes a response of its template.

        Raises:
            UserError: If there is no such folder or Hub id, no network, no fast tokenizer, or no
                usable pad token.
        """
        tokenizer = _load_pretrained(self.path)
        if not tokenizer.is_fast:
            raise UserError(f"the tokenizer of {self.path!r} is not a fast one (no tokenizer.json)")
        _set_pad_token(tokenizer, self.pad_token)
        if len(tokenizer("a\U0001f9ff")["input_ids"]) == len(tokenizer("a")["input_ids"]):
            logger.warning(
                "the tokenizer of %s silently drops characters that its vocabulary lacks", self.path
            )
        return tokenizer


@dataclass(frozen=True)
class TrainedTokenizer:
    """A byte-level BPE trained on the data at hand, for backbones that start from scratch.

    Every text can be encoded and decodes to itself. Its chat template ends every prompt and every
    response with a special token.

    Args:
        vocab_size: Size of the vocabulary with special tokens; little text gives a smaller one.
        words: Words that shall be a token each although the texts may not have them, such as the
            names of attributes in labels that the policy will read one day.

    Raises:
        UserError: If the vocabulary cannot hold every byte and the special tokens.
    """

    vocab_size: int
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.vocab_size < _SMALLEST_VOCABULARY:
            raise UserError(
                f"vocab_size must be at least {_SMALLEST_VOCABULARY} (every byte and "
                f"{len(SPECIAL_TOKENS)} special tokens), got {self.vocab_size}"
            )

    def build(self, texts: Texts, cache_dir: str | Path) -> PreTrainedTokenizerFast:
        """Train on the texts, or reuse what was trained on the same ones.

        Args:
            texts: Gives the training texts; called once if the cache has the tokenizer, else twice.
            cache_dir: Folder for trained tokenizers.

        Returns:
            The tokenizer, with its chat template.

        Raises:
            UserError: If there is no text, or the cache cannot be written.
        """
        from tokenizers import Tokenizer

        folder = Path(cache_dir).expanduser() / "tokenizers"
        parts = (_texts_hash(texts), str(self.vocab_size), *self.words)
        file = folder / f"{'-'.join(parts)}.json"
        try:
            backend = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception:  # missing, damaged or of another format: `tokenizers` raises Exception
            backend = _train(texts, self.vocab_size, self.words)
            _save(backend, file)
        return _with_chat(backend)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides which ids a text gets.

    Args:
        tokenizer: A fast tokenizer.

    Returns:
        SHA-256 of its vocabulary, pipeline, special tokens and chat template, in hexadecimal.
    """
    parts = [*tokenizer_parts(tokenizer), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _load_pretrained(path: str) -> Any:
    """Load from a folder or, if it can be reached, the Hub."""
    from transformers import AutoTokenizer

    folder = Path(path).expanduser()
    local = folder.is_dir()
    if not local and not _HUB_ID.fullmatch(path):
        raise UserError(f"there is no folder {path!r}, and it is no id of the Hugging Face Hub")
    offline = not local and hub_unreachable() is not None
    try:
        return AutoTokenizer.from_pretrained(
            str(folder) if local else path,
            local_files_only=local or offline,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if offline:
            require_hub(
                f"the tokenizer {path!r}",
                "set backbone.tokenizer.path (and backbone.path) to a local folder",
            )
        raise UserError(f"cannot load a tokenizer from {path!r}: {error}") from error


def _set_pad_token(tokenizer: PreTrainedTokenizerFast, wanted: str | None) -> None:
    """Give the tokenizer a pad token that ends no response."""
    taken = _closing_tokens(tokenizer)
    vocabulary = tokenizer.get_vocab()
    if wanted is not None:
        if wanted not in vocabulary or vocabulary[wanted] in taken:
            reason = "closes a response" if wanted in vocabulary else "is not in the vocabulary"
            raise UserError(f"backbone.tokenizer.pad_token={wanted!r} {reason}: choose another")
        tokenizer.pad_token = wanted
        return
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return
    usable = [token for token in KNOWN_PAD_TOKENS if vocabulary.get(token, -1) not in {-1, *taken}]
    if not usable:
        raise UserError(
            f"the tokenizer pads with {tokenizer.pad_token!r}, which also ends a text, and has no "
            "token known to be free: set backbone.tokenizer.pad_token to a token that no text holds"
        )
    tokenizer.pad_token = usable[0]


def _closing_tokens(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids that a pad token must not have: EOS, and what closes a response of the own template."""
    taken = {tokenizer.eos_token_id} - {None}
    saved, tokenizer.pad_token = tokenizer.pad_token, None  # binding refuses an unusable pad token
    try:
        taken |= set(ChatFormat("auto").bind(tokenizer).closing_ids)
    except UserError:  # not a template for us; the one that is used will be checked by `bind`
        pass
    finally:
        tokenizer.pad_token = saved
    return taken


def _texts_hash(texts: Texts) -> str:
    """Hash of a stream of texts and their borders."""
    digest = hashlib.sha256()
    empty = True
    for text in texts():
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
        empty = False
    if empty:
        raise UserError("there is no text to train a tokenizer on")
    return digest.hexdigest()[:32]


def _train(texts: Texts, vocab_size: int, words: tuple[str, ...]) -> Tokenizer:
    """Train a byte-level BPE, on the words as if each came many times."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(chain(texts(), words * WORD_COUNT), trainer)
    # As Llama 3 has it: BOS in the template, and for those who tokenise plain text.
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A",
        pair="<|bos|> $A <|bos|>:1 $B:1",
        special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))],
    )
    return backend


def _with_chat(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a trained backend for transformers."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = shipped_template("trained")
    return tokenizer


def _save(backend: Tokenizer, file: Path) -> None:
    """Write a tokenizer so that nobody sees half of it."""

    def write(stream: BinaryIO) -> None:
        stream.write(backend.to_str().encode("utf-8"))

    write_atomic(file, write)
