"""One tokenizer for all."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from helpsteer2.data.tokenizer import TrainedTokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    texts = ["to be or not to be", "why not? I see."]
    return TrainedTokenizer(300).build(lambda: iter(texts), tmp_path_factory.mktemp("cache"))
