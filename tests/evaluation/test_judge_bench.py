from __future__ import annotations

import json
import re
import zlib
from dataclasses import replace

import numpy as np
import pytest

from helpsteer2.errors import DataError, UserError
from helpsteer2.evaluation import judge_bench as jb
from helpsteer2.evaluation.judge_bench import JudgeBench

QUICK = 50

SOURCES = {
    "knowledge": "mmlu-pro-computer science",
    "reasoning": "livebench-reasoning",
    "math": "livebench-math",
    "coding": "livecodebench",
}

# Knowledge, Reasoning, Math, Code and Overall, as printed in arXiv 2505.11475.
HELPSTEER3 = {
    "Principle": ((74.0, 74.5, 82.1, 81.0), 76.3),
    "Reward": ((70.8, 76.5, 82.1, 66.7), 73.7),
}


def rows_of(counts):
    """Pairs whose right response is A and B in turn."""
    return [
        {
            "pair_id": f"{category} {i}",
            "original_id": i,
            "source": SOURCES[category],
            "question": f"{category} {i}",
            "response_model": "somebody",
            "response_A": "wrong answer" if i % 2 else "right one",
            "response_B": "right one" if i % 2 else "wrong answer",
            "label": "B>A" if i % 2 else "A>B",
        }
        for category, n in counts.items()
        for i in range(n)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def helpfulness(function):
    return lambda prompt, response: [function(prompt, response), 0, 0, 0, len(response) / 100]


SOME = {"knowledge": 4, "reasoning": 3, "math": 2, "coding": 1}


@pytest.fixture
def evaluated(fakes, context):
    def evaluate(path, function, **options):
        bench = JudgeBench(str(path), resamples=QUICK, **options)
        result = bench.evaluate(fakes.scorer(function), context)
        return result, result["weightings"]["helpfulness_only"]

    return evaluate


@pytest.mark.parametrize("model", HELPSTEER3)
def test_published_overall_figures_are_the_micro_average(model):
    categories, overall = HELPSTEER3[model]
    accuracies = dict(zip(SOURCES, categories, strict=True))
    # The printed categories are rounded by up to .05.
    assert jb.micro_average(accuracies, jb.COUNTS["gpt"]) == pytest.approx(overall, abs=0.1)
    assert jb.macro_average(accuracies) == pytest.approx(np.mean(categories))


def test_macro_and_micro_of_a_published_model_differ():
    accuracies = dict(zip(SOURCES, HELPSTEER3["Principle"][0], strict=True))
    assert jb.macro_average(accuracies) == pytest.approx(77.9, abs=0.05)


def test_counts_are_those_of_the_benchmark():
    assert {split: sum(counts.values()) for split, counts in jb.COUNTS.items()} == {
        "gpt": 350,
        "claude": 270,
    }


def test_the_label_tells_the_right_response_in_either_place(evaluated, tmp_path):
    path = write(tmp_path / "gpt.jsonl", rows_of(SOME))
    right = helpfulness(lambda prompt, response: float(response == "right one"))
    result, figures = evaluated(path, right)
    assert result["pairs"] == 10
    assert figures["micro_average"]["value"] == figures["macro_average"]["value"] == 1.0
    # The right response is the shorter one here.
    assert result["weightings"]["longer_response"]["micro_average"]["value"] == 0.0


def test_micro_weighs_pairs_and_macro_weighs_categories(evaluated, tmp_path):
    path = write(tmp_path / "gpt.jsonl", rows_of(SOME))

    def reward(prompt, response):
        return float((response == "right one") == prompt.startswith(("knowledge", "coding")))

    _, figures = evaluated(path, helpfulness(reward))
    assert figures["micro_average"]["value"] == pytest.approx(5 / 10)
    assert figures["macro_average"]["value"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert figures["subsets"]["reasoning"]["wrong"] == 3


def test_a_tie_is_a_miss_whatever_the_label(evaluated, tmp_path):
    path = write(tmp_path / "gpt.jsonl", rows_of(SOME))
    _, figures = evaluated(path, helpfulness(lambda prompt, response: 1.0))
    assert figures["micro_average"]["value"] == 0.0
    assert {name: cell["ties"] for name, cell in figures["subsets"].items()} == SOME
    assert figures["subsets"]["knowledge"]["half_credit_accuracy"] == 0.5


def test_one_pass_serves_every_weighting_and_splits_are_kept_apart(fakes, context, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "gpt.jsonl", rows_of(SOME))
    write(folder / "claude.jsonl", rows_of({**SOME, "math": 5}))
    scorer = fakes.scorer(helpfulness(lambda prompt, response: len(response)))
    bench = JudgeBench(str(folder), resamples=QUICK)
    first = bench.evaluate(scorer, context)
    assert scorer.scored == 10
    assert set(first["weightings"]) == {"helpfulness_only", "uniform", "brief", "longer_response"}
    other = replace(bench, split="claude").evaluate(scorer, context)
    assert (scorer.scored, other["pairs"], other["split"]) == (23, 13, "claude")
    bench.evaluate(scorer, context)
    assert scorer.scored == 23


def test_published_file_names_are_found_in_a_clone(evaluated, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split, counts in jb.COUNTS.items():
        write(data / f"{jb.FILES[split]}.jsonl", rows_of(counts))
    right = helpfulness(lambda prompt, response: float(response == "right one"))
    for split, counts in jb.COUNTS.items():
        result, figures = evaluated(tmp_path, right, split=split)
        assert result["unusual_counts"] == {}
        assert result["pairs"] == sum(counts.values())
        assert figures["micro_average"]["value"] == 1.0


def test_pairs_of_one_question_are_resampled_together(evaluated, tmp_path):
    """Pairs of one question that agree are one observation."""
    rows = rows_of({"knowledge": 400, "reasoning": 1, "math": 1, "coding": 1})
    for i, row in enumerate(rows[:400]):
        row["question"] = f"question {i // 4}"

    def half(prompt, response):
        number = int(prompt.split()[1])
        return float((response == "right one") == (number < 50))

    _, figures = evaluated(write(tmp_path / "gpt.jsonl", rows), helpfulness(half))
    cell = figures["subsets"]["knowledge"]["accuracy"]
    assert cell["high"] - cell["low"] == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 100), rel=0.35)


def test_a_missing_category_is_said(evaluated, tmp_path, as_text):
    path = write(tmp_path / "gpt.jsonl", rows_of({"knowledge": 3, "math": 2}))
    result, figures = evaluated(path, helpfulness(lambda p, r: float(r == "right one")))
    assert figures["subsets"]["knowledge"]["accuracy"]["value"] == 1.0
    assert figures["macro_average"]["not_computable"] == "no prompts of reasoning, coding"
    assert figures["micro_average"]["value"] is None
    assert "no prompts of reasoning, coding" in " ".join(
        as_text(JudgeBench().tables(result)).split()
    )


def test_every_bad_row_is_listed_with_line_and_field(fakes, context, tmp_path):
    rows = rows_of({"math": 6})
    rows[0]["label"] = "A=B"
    rows[1]["source"] = "arena"
    del rows[2]["response_B"]
    rows[3]["question"] = " "
    rows[4]["response_A"] = None
    path = write(tmp_path / "gpt.jsonl", rows)
    scorer = fakes.scorer(helpfulness(lambda prompt, response: 0.0))
    with pytest.raises(DataError) as error:
        JudgeBench(path).evaluate(scorer, context)
    found = [(problem.line, problem.field) for problem in error.value.problems]
    assert found == [
        (1, "label"), (2, "source"), (3, "response_B"), (4, "question"), (5, "response_A")
    ]  # fmt: skip
    assert "A=B" in str(error.value)
    assert "arena" in str(error.value)
    assert scorer.scored == 0


def test_a_file_of_another_schema_is_told_once_and_not_by_row(fakes, context, tmp_path):
    path = write(tmp_path / "gpt.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 50)
    with pytest.raises(DataError) as error:
        JudgeBench(path).evaluate(fakes.scorer(helpfulness(lambda p, r: 0.0)), context)
    found = [(problem.line, problem.field) for problem in error.value.problems]
    columns = ("question", "response_A", "response_B", "label", "source")
    assert found == [(None, column) for column in columns]


def test_without_network_the_hub_fails_at_once_and_names_the_local_way(
    fakes, context, monkeypatch, tmp_path
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    scorer = fakes.scorer(helpfulness(lambda prompt, response: 0.0))
    with pytest.raises(UserError, match=r"evaluators\.judge_bench\.path=DIR.*gpt\.jsonl") as error:
        JudgeBench("nobody/no-such-benchmark").evaluate(scorer, context)
    assert "data.path" not in str(error.value)


def test_tables_fit_100_columns(fakes, context, tmp_path, as_text):
    bench = JudgeBench(write(tmp_path / "gpt.jsonl", rows_of(jb.COUNTS["gpt"])), resamples=QUICK)
    scorer = fakes.scorer(helpfulness(lambda p, r: zlib.crc32(f"{p}|{r}".encode()) % 9))
    names = ["helpsteer2_llama3_70b", "nemotron4_340b", "helpsteer2_rlhf", "a", "b", "c"]
    weightings = tuple(replace(context.weightings[0], name=name) for name in names)
    result = bench.evaluate(scorer, replace(context, weightings=weightings))
    text = as_text(bench.tables(result))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for weights in [*names, "longer_response"]:
        lines = [line for line in text.splitlines() if line.split()[:1] == [weights]]
        assert [len(re.findall(r"\d\.\d", line)) for line in lines] == [6]
    assert set(bench.headlines(result)) >= {"a, micro %", "a, macro %"}
