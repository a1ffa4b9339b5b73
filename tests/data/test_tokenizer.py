from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import sample_tokenizers as sample
from hypothesis import given, settings
from hypothesis import strategies as st

from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.tokenizer import (
    SPECIAL_TOKENS,
    PretrainedTokenizer,
    TrainedTokenizer,
    tokenizer_hash,
)
from helpsteer2.errors import UserError

TEXTS = sample.CORPUS


def no_texts():
    raise AssertionError("a pretrained tokenizer needs no texts")


def saved(tokenizer, folder: Path) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


class TestTrained:
    def test_special_tokens_and_template(self, tmp_path):
        tokenizer = TrainedTokenizer(300).build(lambda: iter(TEXTS), tmp_path)
        assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4, 5]
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert ChatFormat("backbone").bind(tokenizer).closing_ids == [2]
        assert len(tokenizer) == 300

    def test_little_text_gives_a_smaller_vocabulary(self, tmp_path):
        assert len(TrainedTokenizer(2048).build(lambda: iter(["ab ab"]), tmp_path)) < 300

    def test_training_is_deterministic(self, tmp_path):
        builds = [
            TrainedTokenizer(400).build(lambda: iter(TEXTS * 5), tmp_path / str(i))
            for i in range(3)
        ]
        assert len({tokenizer_hash(tokenizer) for tokenizer in builds}) == 1

    def test_every_text_decodes_to_itself(self, tmp_path_factory):
        tokenizer = sample.trained(str(tmp_path_factory.mktemp("trained")))

        @given(st.text())
        @settings(max_examples=200, deadline=None)
        def check(text):
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert all(len(SPECIAL_TOKENS) <= token < len(tokenizer) for token in ids)

        check()

    def test_cache_is_keyed_by_texts_and_size(self, tmp_path):
        passes = []

        def texts(corpus):
            def give():
                passes.append(1)
                return iter(corpus)

            return give

        first = TrainedTokenizer(300).build(texts(TEXTS), tmp_path)
        assert len(passes) == 2
        again = TrainedTokenizer(300).build(texts(TEXTS), tmp_path)
        assert len(passes) == 3, "a cached tokenizer needs the texts for their hash alone"
        assert tokenizer_hash(again) == tokenizer_hash(first)
        others = [
            TrainedTokenizer(310).build(texts(TEXTS), tmp_path),
            TrainedTokenizer(300).build(texts(TEXTS[:2]), tmp_path),
            TrainedTokenizer(300).build(texts(["".join(TEXTS)]), tmp_path),
        ]
        assert len(passes) == 9
        assert len({tokenizer_hash(t) for t in [first, *others]}) >= 3
        assert len(list((tmp_path / "tokenizers").iterdir())) == 4, "no files are left behind"

    @pytest.mark.parametrize("content", ["", "{", '{"version": "9"}', "\x00\xff"])
    def test_a_damaged_cache_is_rebuilt(self, tmp_path, content):
        build = TrainedTokenizer(300).build
        before = tokenizer_hash(build(lambda: iter(TEXTS), tmp_path))
        (file,) = (tmp_path / "tokenizers").iterdir()
        whole = file.read_bytes()
        file.write_text(content)
        assert tokenizer_hash(build(lambda: iter(TEXTS), tmp_path)) == before
        assert file.read_bytes() == whole

    def test_errors(self, tmp_path):
        with pytest.raises(UserError, match="at least 262"):
            TrainedTokenizer(261)
        with pytest.raises(UserError, match="no text"):
            TrainedTokenizer(300).build(lambda: iter([]), tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot write"):
            TrainedTokenizer(300).build(lambda: iter(TEXTS), tmp_path / "file")


class TestHash:
    def test_it_does_not_depend_on_calls_made(self):
        tokenizer = sample.llama3_like()
        before = tokenizer_hash(tokenizer)
        tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
        assert tokenizer_hash(tokenizer) == before

    def test_it_changes_with_what_decides_ids(self):
        hashes = {tokenizer_hash(sample.llama3_like())}
        for attribute, value in (
            ("chat_template", "{{ messages }}"),
            ("pad_token", "<|end_of_text|>"),
            ("bos_token", "<|end_of_text|>"),
        ):
            tokenizer = sample.llama3_like()
            setattr(tokenizer, attribute, value)
            hashes.add(tokenizer_hash(tokenizer))
        tokenizer = sample.llama3_like()
        tokenizer.add_tokens(["boiling"])
        hashes.add(tokenizer_hash(tokenizer))
        assert len(hashes) == 5

    @pytest.mark.parametrize("model_type", [None, "llama", "qwen3"])
    @pytest.mark.parametrize("family", ["llama3", "qwen3", "trained"])
    def test_saved_and_loaded_it_is_the_same_tokenizer(self, tmp_path, family, model_type):
        makers = {"llama3": sample.llama3_like, "qwen3": sample.qwen3_like}
        tokenizer = (
            makers[family]() if family in makers else sample.trained(str(tmp_path / "cache"))
        )
        folder = tmp_path / "saved"
        saved(tokenizer, folder)
        if model_type is not None:
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        loaded = PretrainedTokenizer(str(folder)).build(no_texts, tmp_path)
        assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
        text = "Hello <|im_end|> there\n\n 日本 don't  <think>"
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


class TestPadToken:
    def build(self, tokenizer, tmp_path, pad_token=None):
        return PretrainedTokenizer(saved(tokenizer, tmp_path / "model"), pad_token).build(
            no_texts, tmp_path
        )

    @pytest.mark.parametrize("pad", ["<|eot_id|>", None])
    def test_a_reserved_token_replaces_an_unusable_one(self, tmp_path, pad):
        before = sample.llama3_like(pad)
        tokenizer = self.build(before, tmp_path)
        assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
        assert len(tokenizer) == len(before), "the embeddings must never need resizing"

    def test_a_closing_token_is_not_usable_even_if_it_is_not_eos(self, tmp_path):
        tokenizer = sample.qwen3_like()
        for pad in ("<|endoftext|>", "<|im_end|>"):
            tokenizer.eos_token, tokenizer.pad_token = "<|endoftext|>", pad
            with pytest.raises(UserError, match=r"set backbone\.tokenizer\.pad_token"):
                self.build(tokenizer, tmp_path)
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|im_end|>"
        assert self.build(tokenizer, tmp_path).pad_token == "<|endoftext|>"

    def test_a_good_pad_token_is_kept(self, tmp_path):
        assert self.build(sample.qwen3_like(), tmp_path).pad_token == "<|endoftext|>"

    def test_the_option_wins(self, tmp_path):
        tokenizer = self.build(sample.llama3_like(), tmp_path, "<|end_of_text|>")
        assert tokenizer.pad_token == "<|end_of_text|>"
        assert tokenizer.pad_token_id == tokenizer.get_vocab()["<|end_of_text|>"]

    @pytest.mark.parametrize("token", ["<|eot_id|>", "<nowhere>"])
    def test_a_wrong_option_is_refused(self, tmp_path, token):
        with pytest.raises(UserError, match=r"backbone\.tokenizer\.pad_token="):
            self.build(sample.llama3_like(), tmp_path, token)


class TestPretrained:
    def test_missing_folder(self, tmp_path):
        with pytest.raises(UserError, match="there is no folder"):
            PretrainedTokenizer(str(tmp_path / "none")).build(no_texts, tmp_path)

    def test_folder_without_tokenizer(self, tmp_path):
        with pytest.raises(UserError, match="cannot load a tokenizer"):
            PretrainedTokenizer(str(tmp_path)).build(no_texts, tmp_path)

    def test_hub_id_without_network_fails_at_once(self, tmp_path, monkeypatch):
        monkeypatch.setattr("helpsteer2.data.hub.is_reachable", lambda: False)
        start = time.monotonic()
        with pytest.raises(UserError, match=r"nobody/nothing.*set backbone\.tokenizer\.path"):
            PretrainedTokenizer("nobody/nothing").build(no_texts, tmp_path)
        assert time.monotonic() - start < 10, "retries of the Hub's client take 20 s and more"

    @pytest.mark.skipif(
        "HELPSTEER2_REAL_DATA" not in os.environ, reason="needs HELPSTEER2_REAL_DATA"
    )
    def test_tinystories(self, tmp_path, caplog):
        folder = Path(os.environ["HELPSTEER2_REAL_DATA"]) / "tinystories_656k"
        tokenizer = PretrainedTokenizer(str(folder)).build(no_texts, tmp_path)
        assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
        assert "drops characters" in caplog.text
        chat = ChatFormat().bind(tokenizer)
        assert chat.template_name == "plain"
        ids = chat.prompt_ids([{"role": "user", "content": "Once upon a time"}])
        assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)
        assert tokenizer_hash(
            PretrainedTokenizer(saved(tokenizer, tmp_path / "saved")).build(no_texts, tmp_path)
        ) == tokenizer_hash(tokenizer)
