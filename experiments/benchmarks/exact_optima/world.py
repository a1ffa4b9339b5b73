"""A world so small that all responses can be listed: ten tokens, one or two of them a response.

What it is made of is real: a tokenizer with a chat template, prompts, a Llama, and what scores its
responses. So a policy's expected reward and its distance to another policy are sums, not estimates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from helpsteer2.data.groups import Group, Message, Report
from helpsteer2.data.packing import pack
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.models.policy import Policy

Array = npt.NDArray[np.float64]

PAD, END, ASKED, LETTERS = "_", "!", "?", "abcdefg"
TOKENS = PAD + END + ASKED + LETTERS
"""The whole vocabulary. A policy may write any of it, whether it makes sense or not."""

TEMPLATE = (
    "{%- for message in messages -%}{{ message['content'] }}"
    "{%- if message['role'] == 'assistant' -%}!{%- else -%}?{%- endif -%}{%- endfor -%}"
)

SHAPE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16,
    # A start that prefers some responses, and yet tries the others.
    "initializer_range": 0.1,
}  # fmt: skip

PROMPT: tuple[Message, ...] = ({"role": "user", "content": "a"},)


def write_tokenizer(folder: Path) -> str:
    """Write the tokenizer where ``PretrainedTokenizer`` finds it: a token is a character."""
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (PAD, END)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class OnePrompt:
    """The prompt of the world, several times under other ids, so that samples differ.

    Args:
        copies: How often.
    """

    copies: int
    attribute_names: tuple[str, ...] = ()

    def read(self, split: str, report: Report) -> Iterator[Group]:
        """No responses are given."""
        yield from ()

    def prompts(self, split: str, report: Report) -> Iterator[Group]:
        """All copies."""
        for copy in range(self.copies):
            yield Group(f"copy-{copy}", "made up", PROMPT, ())

    def fingerprint(self, split: str) -> str:
        """What tells it from another number of copies."""
        return str(self)


@dataclass(frozen=True)
class FixedRewards:
    """A reward of 0 to 1 for every text of a response, drawn once and for all.

    Args:
        seed: Of the draw.
    """

    seed: int = 7
    attribute_names: tuple[str, ...] = ("reward",)

    @property
    def model_hash(self) -> str:
        """Tells it from other rewards."""
        return f"fixed rewards of seed {self.seed}"

    def score(self, groups: Iterable[Group]) -> Iterator[npt.NDArray[np.float32]]:
        """Scores ``(n, 1)`` of the responses of each group."""
        for group in groups:
            yield np.array([[self.reward(text)] for text in group.responses], np.float32)

    def reward(self, response: str) -> float:
        """The reward of a response, whenever it is asked for."""
        places = [TOKENS.index(token) for token in response]
        return float(np.random.default_rng([self.seed, *places]).random())


@dataclass(frozen=True)
class Responses:
    """All responses of up to so many tokens, in a fixed order, and the states they go through.

    Args:
        longest: Tokens; a response of so many is cut, unless its last one ends it.
    """

    longest: int

    @cached_property
    def ids(self) -> list[tuple[int, ...]]:
        """The R responses."""
        end = TOKENS.index(END)
        found = []
        for length in range(1, self.longest + 1):
            for ids in product(range(len(TOKENS)), repeat=length):
                if end not in ids[:-1] and (ids[-1] == end or length == self.longest):
                    found.append(ids)
        return found

    @cached_property
    def texts(self) -> list[str]:
        """The R responses as a scorer reads them, without control tokens."""
        written = ASKED + LETTERS
        return ["".join(TOKENS[i] for i in ids if TOKENS[i] in written) for ids in self.ids]

    @cached_property
    def prefixes(self) -> dict[tuple[int, ...], int]:
        """Number of each of the S states that a token is chosen in, short ones first."""
        states = sorted({ids[:n] for ids in self.ids for n in range(len(ids))}, key=len)
        return {state: number for number, state in enumerate(states)}

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """``(R,)`` tokens."""
        return np.array([len(ids) for ids in self.ids])

    @cached_property
    def states(self) -> npt.NDArray[np.int64]:
        """``(N,)`` state of each token, response after response."""
        return np.array([self.prefixes[ids[:n]] for ids in self.ids for n in range(len(ids))])

    @cached_property
    def choices(self) -> npt.NDArray[np.int64]:
        """``(N,)`` the tokens."""
        return np.array([token for ids in self.ids for token in ids])

    def sums(self, values: Array) -> Array:
        """``(R,)`` sums of ``(N,)`` values of tokens over responses."""
        return np.add.reduceat(values, np.cumsum(self.lengths) - self.lengths)

    def logprobs(self, table: Array) -> Array:
        """``(R,)`` log-probabilities of whole responses.

        Args:
            table: ``(S, V)`` log-probabilities of every token in every state.
        """
        return self.sums(table[self.states, self.choices])

    def group(self, policy: Policy) -> TokenGroup:
        """The prompt with all responses, for a policy's own path of training."""
        return TokenGroup(
            prompt_ids=np.asarray(policy.spec.chat.prompt_ids(PROMPT), np.int32),
            response_ids=tuple(np.asarray(ids, np.int32) for ids in self.ids),
            attributes=np.empty((len(self.ids), 0), np.float32),
            preference_strength=float("nan"),
            index=0,
        )

    def table(self, policy: Policy) -> Array:
        """``(S, V)`` log-probabilities of every token in every state behind the prompt, in nats."""
        with torch.no_grad():
            found = policy.response_logprobs(pack([self.group(policy)])).logprobs
        table = np.full((len(self.prefixes), len(TOKENS)), np.nan)
        table[self.states, self.choices] = found.double().numpy()
        return table

    def rewards(self, scorer: FixedRewards) -> Array:
        """``(R,)`` rewards of the responses.

        Args:
            scorer: Gives them.
        """
        return np.array([scorer.reward(text) for text in self.texts])
