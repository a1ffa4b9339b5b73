"""From rendered text to ids, where control tokens that a message holds are ordinary text.

Before a template sees a message, the control tokens in it are replaced by marks that no valid text
contains. So only the template writes control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from helpsteer2.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = re.compile("\ud800(\\d+)\ud801")
_SURROGATE = re.compile("[\ud800-\udfff]")


class TextEncoder:
    """Encodes texts in which the control tokens of messages are marked.

    Args:
        tokenizer: A fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Longest first: a token may be the beginning of another.
        added = tokenizer.added_tokens_decoder.values()
        self._control_tokens = sorted(
            {token.content for token in added if token.special}, key=lambda name: (-len(name), name)
        )
        alternatives = "|".join(re.escape(token) for token in self._control_tokens)
        self._control = re.compile(alternatives) if alternatives else None
        self._literal_ids: dict[int, list[int]] = {}

    def mark(self, content: str) -> str:
        """Replace control tokens by marks made of lone surrogates, which no valid text contains.

        Args:
            content: Text of a message.

        Raises:
            UserError: If the text holds lone surrogates itself.
        """
        if _SURROGATE.search(content):
            raise UserError("the text is not valid Unicode: it holds lone surrogates (\\ud800 …)")
        if self._control is None:
            return content
        return self._control.sub(
            lambda match: f"\ud800{self._control_tokens.index(match[0])}\ud801", content
        )

    def unmark(self, text: str) -> str:
        """Put the control tokens back."""
        return _MARK.sub(lambda match: self._control_tokens[int(match[1])], text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, in one call of the tokenizer and with nothing added.

        Args:
            texts: Texts; marked control tokens in them are encoded as ordinary text.

        Returns:
            Ids of each text.
        """
        pieces = [_MARK.split(text) for text in texts]
        plain = [piece for split in pieces for piece in split[::2]]
        encoded = iter(self._encode_plain(plain) if plain else [])
        result = []
        for split in pieces:
            ids = next(encoded)
            for mark in split[1::2]:
                ids = ids + self._encode_literally(int(mark)) + next(encoded)
            result.append(ids)
        return result

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        """Encode texts whose control tokens were written by the template."""
        # verbose=False: the length warning means nothing here, LengthLimits cuts later.
        encoded: Any = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return list(encoded["input_ids"])

    def _encode_literally(self, token: int) -> list[int]:
        """Encode a control token as the characters of its name."""
        if token not in self._literal_ids:
            encoded = self._tokenizer(
                self._control_tokens[token], add_special_tokens=False, split_special_tokens=True
            )
            self._literal_ids[token] = list(encoded["input_ids"])
        return self._literal_ids[token]


def tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Everything of a tokenizer that decides which ids a text gets, for hashes.

    Args:
        tokenizer: A fast tokenizer.

    Returns:
        Vocabulary and pipeline, and the special tokens, as JSON can hold them.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls leave their padding and truncation behind in the backend.
    for state in ("padding", "truncation"):
        backend.pop(state, None)
    return [backend, tokenizer.special_tokens_map]
