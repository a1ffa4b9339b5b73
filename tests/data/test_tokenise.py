from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import sample_tokenizers as sample

from helpsteer2.data import tokenise as module
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Group, Report
from helpsteer2.data.lengths import CutReport, LengthLimits
from helpsteer2.data.tokenise import encode_group, tokenise
from helpsteer2.data.tokenizer import PretrainedTokenizer
from helpsteer2.errors import DataError, Problem, UserError

NAMES = ("helpfulness", "verbosity")
LIMITS = LengthLimits(60, 40)


@dataclass(frozen=True)
class FakeSource:
    groups: tuple[Group, ...]
    attribute_names: tuple[str, ...] = NAMES
    name: str = "fake"
    bad: tuple[Problem, ...] = ()

    def read(self, split: str, report: Report) -> Iterator[Group]:
        for problem in self.bad:
            report(problem)
        yield from self.groups

    def fingerprint(self, split: str) -> str:
        return self.name


class Closed(FakeSource):
    """A source that must not be read."""

    def read(self, split: str, report: Report) -> Iterator[Group]:
        raise AssertionError("the cache was not used")


def group(i: int, responses=("Six minutes. ", "It depends. "), **more) -> Group:
    prompt = (
        {"role": "user", "content": f"question {i} " * (i % 5 + 1)},
        {"role": "assistant", "content": "Which egg?"},
        {"role": "user", "content": "That one. " * (i % 7 + 1)},
    )
    texts = tuple(text * (i % 4 + 1) for text in responses)
    return Group(
        id=f"id-{i}-é", source=f"rows.jsonl:{i + 1}", prompt=prompt, responses=texts, **more
    )


def rated(n: int) -> tuple[Group, ...]:
    """Groups with 1 to 3 responses, every third rating unknown, some groups without any."""
    result = []
    for i in range(n):
        responses = ("Six minutes. ", "It depends. ", "No idea. ")[: i % 3 + 1]
        ratings = tuple(
            tuple(None if (i + r + a) % 3 == 0 else float((i + r + 2 * a) % 5) for a in range(2))
            for r in range(len(responses))
        )
        more = {} if i % 5 == 4 else {"attributes": ratings}
        strength = i % 7 - 3 if len(responses) == 2 else None
        result.append(group(i, responses, preference_strength=strength, **more))
    return tuple(result)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return ChatFormat().bind(sample.trained(str(tmp_path_factory.mktemp("trained"))))


def store_of(cache: Path) -> Path:
    (folder,) = (path for path in (cache / "tokenised").iterdir() if path.is_dir())
    return folder


class TestContents:
    @pytest.mark.parametrize("n", [1, 600])
    def test_batched_equals_one_by_one(self, chat, tmp_path, n):
        groups = rated(n)
        stored = tokenise(FakeSource(groups), "train", chat, LIMITS, NAMES, tmp_path)
        report = CutReport()
        assert len(stored) == n
        assert list(stored.ids) == [g.id for g in groups]
        for i, g in enumerate(groups):
            single = encode_group(g, i, chat, LIMITS, NAMES, NAMES, report)
            token_group = stored[i]
            assert token_group.index == i
            assert np.array_equal(token_group.prompt_ids, single.prompt_ids)
            assert len(token_group.response_ids) == len(g.responses)
            for ours, theirs in zip(token_group.response_ids, single.response_ids, strict=True):
                assert np.array_equal(ours, theirs)
                assert ours.dtype == np.int32
            assert np.array_equal(token_group.attributes, single.attributes, equal_nan=True)
            assert token_group.attributes.dtype == np.float32
            assert token_group.n_tokens == stored.lengths[i]
            assert len(token_group.prompt_ids) <= LIMITS.max_prompt_tokens
            assert max(map(len, token_group.response_ids)) <= LIMITS.max_response_tokens
            strength = g.preference_strength
            assert token_group.preference_strength == strength or (
                strength is None and np.isnan(token_group.preference_strength)
            )
        assert report.counts().items() <= stored.report.items()
        assert stored.report["tokens"] == stored.lengths.sum()
        assert stored.report["responses"] == sum(len(g.responses) for g in groups)
        if n > 1:
            assert min(report.counts().values()) > 0, "the test data must need cuts"

    def test_it_is_said_how_often_ids_apart_are_not_those_of_one_text(self, tmp_path, caplog):
        # The split joins newlines on both sides of the boundary into one word.
        groups = tuple(group(i, ("Six.", "\n\nTwo." if i % 4 else "Two.")) for i in range(100))
        chatml = ChatFormat().bind(sample.chatml())
        with caplog.at_level("INFO", "helpsteer2.data.tokenise"):
            stored = tokenise(FakeSource(groups), "train", chatml, LIMITS, (), tmp_path)
        found = (stored.report["boundaries_differing"], stored.report["boundaries_compared"])
        assert found == (48, 64)
        assert "in 48 of the first 64 groups the ids differ" in caplog.text

    def test_nothing_is_said_at_a_special_boundary(self, chat, tmp_path, caplog):
        with caplog.at_level("INFO", "helpsteer2.data.tokenise"):
            stored = tokenise(FakeSource(rated(9)), "train", chat, LIMITS, (), tmp_path)
        assert stored.report["boundaries_differing"] == 0
        assert stored.report["boundaries_compared"] == 9
        assert "the ids differ" not in caplog.text

    def test_uncut_ids_decode_to_the_text(self, chat, tmp_path):
        groups = rated(30)
        stored = tokenise(
            FakeSource(groups), "train", chat, LengthLimits(10**6, 10**6), NAMES, tmp_path
        )
        for i, g in enumerate(groups):
            assert chat.tokenizer.decode(stored[i].prompt_ids) == chat.render(g.prompt, True)
            for ids, answer in zip(stored[i].response_ids, g.responses, strict=True):
                assert chat.tokenizer.decode(ids) == answer + "<|end|>"
        assert stored.report["tokens_cut"] == 0

    def test_negative_and_wrong_positions(self, chat, tmp_path):
        stored = tokenise(FakeSource(rated(5)), "train", chat, LIMITS, NAMES, tmp_path)
        assert stored[-1].index == 4
        assert stored.ids[-1] == "id-4-é"
        assert stored.ids[1:3] == ["id-1-é", "id-2-é"]
        for position in (5, -6):
            with pytest.raises(IndexError):
                stored[position]

    def test_columns_are_matched_by_name(self, chat, tmp_path):
        g = group(0, attributes=((1.0, 4.0), (0.0, None)))
        stored = tokenise(
            FakeSource((g,)), "train", chat, LIMITS, ("verbosity", "humor", "helpfulness"), tmp_path
        )
        wanted = [[4, np.nan, 1], [np.nan, np.nan, 0]]
        assert np.array_equal(stored[0].attributes, wanted, equal_nan=True)
        assert np.array_equal(stored.rating_means(), [4, np.nan, 0.5], equal_nan=True)
        assert np.array_equal(stored.rating_stds(), [0, np.nan, 0.5], equal_nan=True)
        assert stored.attribute_names == ("verbosity", "humor", "helpfulness")

    def test_no_wanted_name_in_common(self, chat, tmp_path):
        # A loss that reads no ratings has no use for them: whether that is a mistake it must say.
        stored = tokenise(FakeSource(rated(2)), "train", chat, LIMITS, ("humor",), tmp_path)
        assert np.isnan(stored[1].attributes).all()

    def test_no_attributes_wanted(self, chat, tmp_path):
        source = FakeSource((group(0),), attribute_names=())
        stored = tokenise(source, "train", chat, LIMITS, (), tmp_path)
        assert stored[0].attributes.shape == (2, 0)

    def test_moments_ignore_unknown_ratings(self, chat, tmp_path):
        groups = rated(200)
        stored = tokenise(FakeSource(groups), "train", chat, LIMITS, NAMES, tmp_path)
        rows = [row for g in groups for row in (g.attributes or ())]
        for a in range(2):
            known = [row[a] for row in rows if row[a] is not None]
            assert stored.rating_means()[a] == pytest.approx(np.mean(known))
            assert stored.rating_stds()[a] == pytest.approx(np.std(known))

    def test_everything_stays_on_disk(self, chat, tmp_path):
        stored = tokenise(FakeSource(rated(3)), "train", chat, LIMITS, NAMES, tmp_path)
        assert isinstance(stored.lengths, np.memmap)
        assert not stored.lengths.flags.writeable
        assert stored[0].prompt_ids.flags.writeable, "torch refuses read-only arrays"
        assert not isinstance(stored[0].prompt_ids, np.memmap)
        for file in store_of(tmp_path).glob("*.npy"):
            np.load(file)


class TestProblems:
    def test_every_bad_group_is_named_at_once(self, chat, tmp_path):
        good = group(0)
        empty = replace(group(1), responses=("fine", "  \n"))
        invalid = replace(group(2), responses=("\ud800", "fine"), source="rows.jsonl")
        unreadable = Problem("rows.jsonl", 9, "helpfulness", "a rating of 5")
        source = FakeSource((good, empty, invalid), bad=(unreadable,))
        with pytest.raises(DataError) as caught:
            tokenise(source, "train", chat, LIMITS, NAMES, tmp_path)
        places = [(problem.file, problem.line) for problem in caught.value.problems]
        assert places == [("rows.jsonl", 9), ("rows.jsonl", 2), ("rows.jsonl", None)]
        assert "empty" in caught.value.problems[1].message
        assert not [path for path in (tmp_path / "tokenised").iterdir() if path.is_dir()]

    def test_encode_group_refuses_an_empty_response(self, chat):
        bad = replace(group(1), responses=("",))
        with pytest.raises(UserError, match="empty"):
            encode_group(bad, 0, chat, LIMITS, NAMES, NAMES, CutReport())

    def test_no_rows(self, chat, tmp_path):
        with pytest.raises(DataError, match="no rows"):
            tokenise(FakeSource(()), "train", chat, LIMITS, NAMES, tmp_path)

    def test_limits_too_small(self, chat, tmp_path):
        with pytest.raises(UserError, match="max_prompt_tokens=2"):
            tokenise(FakeSource(rated(3)), "train", chat, LengthLimits(2, 40), NAMES, tmp_path)

    def test_unwritable_cache(self, chat, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot write tokenised data"):
            tokenise(FakeSource(rated(3)), "train", chat, LIMITS, NAMES, tmp_path / "file")

    def test_a_full_disk_leaves_nothing_behind(self, chat, tmp_path, monkeypatch):
        def full(self, *given):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("helpsteer2.data.token_store.TokenWriter.finish", full)
        with pytest.raises(UserError, match="No space left"):
            tokenise(FakeSource(rated(3)), "train", chat, LIMITS, NAMES, tmp_path)
        assert not [path for path in (tmp_path / "tokenised").iterdir() if path.is_dir()]


class TestCache:
    def test_it_is_used(self, chat, tmp_path):
        first = tokenise(FakeSource(rated(9)), "train", chat, LIMITS, NAMES, tmp_path)
        again = tokenise(Closed(()), "train", chat, LIMITS, NAMES, tmp_path)
        assert again.fingerprint == first.fingerprint
        assert again.report == first.report
        assert np.array_equal(again.lengths, first.lengths)

    def test_everything_that_matters_is_in_its_key(self, chat, tmp_path):
        source = FakeSource(rated(3))
        plain = ChatFormat("plain").bind(chat.tokenizer)
        prompted = ChatFormat(system_prompt="Be brief.").bind(chat.tokenizer)
        other_ids = ChatFormat("plain").bind(sample.qwen3_like())
        calls = [
            (source, "train", chat, LIMITS, NAMES),
            (replace(source, name="other"), "train", chat, LIMITS, NAMES),
            (replace(source, attribute_names=NAMES[::-1]), "train", chat, LIMITS, NAMES),
            (source, "validation", chat, LIMITS, NAMES),
            (source, "train", plain, LIMITS, NAMES),
            (source, "train", prompted, LIMITS, NAMES),
            (source, "train", other_ids, LIMITS, NAMES),
            (source, "train", chat, LengthLimits(61, 40), NAMES),
            (source, "train", chat, LengthLimits(60, 41), NAMES),
            (source, "train", chat, LIMITS, NAMES[::-1]),
            (source, "train", chat, LIMITS, NAMES[:1]),
        ]
        keys = {tokenise(*call, tmp_path).fingerprint for call in calls}
        assert len(keys) == len(calls)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda folder: (folder / "meta.json").unlink(),
            lambda folder: (folder / "meta.json").write_text("{"),
            lambda folder: (folder / "meta.json").write_text("[]"),
            lambda folder: (folder / "tokens.npy").unlink(),
            lambda folder: os.truncate(folder / "tokens.npy", 140),
            lambda folder: flip(folder / "ratings.npy"),
            lambda folder: flip(folder / "trained.npy"),
            lambda folder: (folder / "rewards.npy").unlink(),
            lambda folder: shutil.rmtree(folder) or folder.mkdir(),
        ],
    )
    def test_a_damaged_one_is_rebuilt(self, chat, tmp_path, damage):
        source = FakeSource(rated(9))
        first = tokenise(source, "train", chat, LIMITS, NAMES, tmp_path)
        before = [first[i] for i in range(9)]
        damage(store_of(tmp_path))
        again = tokenise(source, "train", chat, LIMITS, NAMES, tmp_path)
        for i in range(9):
            assert np.array_equal(again[i].prompt_ids, before[i].prompt_ids)
            assert np.array_equal(again[i].attributes, before[i].attributes, equal_nan=True)
        tokenise(Closed(()), "train", chat, LIMITS, NAMES, tmp_path)

    def test_what_a_killed_process_left_is_cleared(self, chat, tmp_path):
        source = FakeSource(rated(9))
        tokenise(source, "train", chat, LIMITS, NAMES, tmp_path)
        folder = store_of(tmp_path)
        folder.rename(folder.with_suffix(".partial"))
        tokenise(source, "train", chat, LIMITS, NAMES, tmp_path)
        assert store_of(tmp_path) == folder

    def test_processes_at_the_same_time(self, chat, tmp_path):
        # fork: the children start at once, with the tokenizer that is there.
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        arguments = (chat, tmp_path, results)
        children = [context.Process(target=tokenise_in_child, args=arguments) for _ in range(4)]
        for child in children:
            child.start()
        answers = [results.get(timeout=60) for _ in children]
        for child in children:
            child.join(timeout=60)
        assert len({lengths for lengths, _ in answers}) == 1
        assert sum(wrote for _, wrote in answers) == 1, "one works, the others wait"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def tokenise_in_child(chat, cache, results) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    wrote = []
    original = module._write
    module._write = lambda *args: (wrote.append(1), original(*args))
    stored = tokenise(FakeSource(rated(300)), "train", chat, LIMITS, NAMES, cache)
    results.put((tuple(stored.lengths.tolist()), len(wrote)))


@pytest.mark.skipif("HELPSTEER2_REAL_DATA" not in os.environ, reason="needs HELPSTEER2_REAL_DATA")
def test_the_real_slice(tmp_path):
    data = Path(os.environ["HELPSTEER2_REAL_DATA"])
    tokenizer = PretrainedTokenizer(str(data / "tinystories_656k")).build(
        lambda: iter(()), tmp_path
    )
    chat = ChatFormat().bind(tokenizer)
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    groups = real_groups(data / "helpsteer2_slice" / "validation.jsonl.gz", names)
    source = FakeSource(groups, names)
    stored = tokenise(source, "validation", chat, LengthLimits(10**6, 10**6), names, tmp_path)
    vocabulary = len(tokenizer)
    known = {c for token in tokenizer.get_vocab() for c in token.replace("▁", " ")}

    def same_words(ids, text: str) -> bool:
        # This vocabulary has no token for some characters: they are dropped.
        decoded = tokenizer.decode(ids).removeprefix(tokenizer.bos_token)
        return decoded.split() == "".join(c for c in text if c in known).split()

    assert len(stored) == len(groups) == 248
    for i, g in enumerate(groups):
        token_group = stored[i]
        assert same_words(token_group.prompt_ids, chat.render(g.prompt, True))
        for ids, answer in zip(token_group.response_ids, g.responses, strict=True):
            assert same_words(ids, answer + tokenizer.eos_token)
            assert 0 <= ids.min() <= ids.max() < vocabulary
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.pad_token_id not in ids
    limits = LengthLimits(100, 256)
    cut = tokenise(source, "validation", chat, limits, names, tmp_path)
    lost = stored.lengths.sum() - cut.lengths.sum()
    assert cut.report["tokens_cut"] == lost > 0
    responses = [ids for i in range(len(stored)) for ids in stored[i].response_ids]
    assert cut.report["responses_cut"] == sum(len(ids) > 256 for ids in responses)
    prompts = [stored[i].prompt_ids for i in range(len(stored))]
    assert cut.report["prompts_cut"] == sum(len(ids) > 100 for ids in prompts)
    assert max(len(cut[i].prompt_ids) for i in range(len(cut))) <= 100


def real_groups(file: Path, names: tuple[str, ...]) -> tuple[Group, ...]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    groups = []
    for i in range(0, len(rows), 2):
        parts = rows[i]["prompt"].split("\n<extra_id_1>")
        messages = [{"role": "user", "content": parts[0]}]
        for part in parts[1:]:
            role, _, content = part.partition("\n")
            messages.append({"role": role.lower(), "content": content})
        pair = rows[i : i + 2]
        groups.append(
            Group(
                id=str(i),
                source=f"{file}:{i + 1}",
                prompt=tuple(messages),
                responses=tuple(row["response"] for row in pair),
                attributes=tuple(tuple(row[name] for name in names) for row in pair),
            )
        )
    return tuple(groups)
