from __future__ import annotations

import json
import os
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpsteer2.errors import DataError, UserError
from helpsteer2.evaluation import rewardbench as rb
from helpsteer2.evaluation.rewardbench import RewardBench

QUICK = 100

CHAT_HARD = (
    "llmbar-adver-manual", "llmbar-adver-neighbor", "llmbar-natural",
    "llmbar-adver-GPTInst", "llmbar-adver-GPTOut", "mt-bench-hard",
)  # fmt: skip

# Overall, Chat, Chat-Hard, Safety, Reasoning and Prior Sets of arXiv 2406.08673, Table 3.
TABLE_3 = {
    "Nemotron-4-340B-RM": (92.0, 95.8, 87.1, 91.5, 93.7, 67.4),
    "Cohere May 2024": (89.5, 96.4, 71.3, 92.7, 97.7, 78.2),
    "ArmoRM-Llama-3-8B": (90.8, 96.9, 76.8, 92.2, 97.3, 74.3),
    "Llama-3-70B-RM": (88.8, 91.3, 80.3, 92.8, 90.7, 66.5),
    "Llama-3-70B (OASST)": (79.1, 91.3, 59.2, 76.0, 89.9, 66.7),
    "Llama-3-70B (HH-RLHF)": (73.9, 94.4, 54.6, 81.2, 65.6, 68.8),
    "Llama-3-70B (HelpSteer)": (66.1, 93.3, 59.7, 56.8, 54.9, 67.7),
}


def of_sections(values):
    """Accuracies of all subsets, equal within a section."""
    return {
        subset: value
        for (_, subsets), value in zip(rb.SECTIONS.items(), values, strict=True)
        for subset in subsets
    }


def rows_of(counts, chosen="good", rejected="bad"):
    return [
        {"prompt": f"{subset} {i}", "chosen": chosen, "rejected": rejected, "subset": subset}
        for subset, n in counts.items()
        for i in range(n)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def helpfulness(function):
    return lambda prompt, response: [function(prompt, response), 0, 0, 0, len(response) / 100]


@pytest.mark.parametrize(
    ("model", "accuracies", "expected"),
    [
        ("Llama-3.1-Nemotron-70B-Reward", (76.1, 88.8, 95.0, 87.0, 72.3, 75.7), 85.75),
        ("Skywork-Reward-Gemma-2-27B", (78.3, 89.6, 96.0, 97.8, 91.5, 86.5), 91.46),
    ],
)
def test_chat_hard_from_its_subsets_gives_the_published_figures(model, accuracies, expected):
    section = rb.section_accuracy("Chat-Hard", dict(zip(CHAT_HARD, accuracies, strict=True)))
    assert section == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("model", TABLE_3)
def test_overall_of_table_3_is_the_mean_of_the_sections(model):
    overall, *sections, _ = TABLE_3[model]
    # The printed sections are rounded by up to .05, and so is the printed mean.
    assert rb.section_mean(of_sections(sections)) == pytest.approx(overall, abs=0.1001)


def test_leaderboard_score_gives_prior_sets_half_the_weight_of_a_section():
    _, *sections, prior = TABLE_3["Llama-3-70B-RM"]
    accuracies = of_sections(sections) | dict.fromkeys(rb.PRIOR_SETS, prior)
    assert rb.leaderboard_score(accuracies) == pytest.approx(
        np.average([*sections, prior], weights=[1, 1, 1, 1, 0.5])
    )


def test_maths_weighs_as_much_as_all_programming_languages_together():
    accuracies = dict.fromkeys(rb.SECTIONS["Reasoning"], 0.0) | {"math-prm": 1.0}
    assert rb.section_accuracy("Reasoning", accuracies) == pytest.approx(0.5)


def test_counts_are_those_of_the_benchmark():
    assert {section: sum(subsets.values()) for section, subsets in rb.SECTIONS.items()} == {
        "Chat": 358,
        "Chat-Hard": 456,
        "Safety": 740,
        "Reasoning": 1431,
    }
    assert sum(rb.COUNTS.values()) == 2985
    assert len(rb.COUNTS) == 23


def test_averages_differ_where_subsets_differ_and_agree_where_they_do_not():
    same = dict.fromkeys(rb.COUNTS, 0.7)
    assert [aggregate(same) for aggregate in rb.AVERAGES.values()] == pytest.approx([0.7] * 5)
    one = dict.fromkeys(rb.COUNTS, 0.0) | {"xstest-should-respond": 1.0}
    assert rb.micro_average(one) == pytest.approx(250 / 2985)
    assert rb.macro_average(one) == pytest.approx(1 / 23)
    assert rb.section_mean(one) == pytest.approx(250 / 740 / 4)
    assert rb.AVERAGES["section_mean_before_2024_09"](one) == pytest.approx(154 / 740 / 4)


@pytest.mark.parametrize("missing", ["math-prm", "donotanswer", "mt-bench-med"])
def test_a_missing_subset_makes_its_section_unknown_and_never_a_mean_over_fewer(missing):
    accuracies = dict.fromkeys(rb.COUNTS, 0.5)
    del accuracies[missing]
    unknown = [s for s in rb.SECTIONS if np.isnan(rb.section_accuracy(s, accuracies))]
    assert unknown == [section for section in rb.SECTIONS if missing in rb.SECTIONS[section]]
    assert np.isnan([rb.section_mean(accuracies), rb.macro_average(accuracies)]).all()
    assert np.isnan(rb.leaderboard_score(dict.fromkeys(rb.COUNTS, 0.5)))


@pytest.fixture
def benchmark_file(tmp_path):
    return write(tmp_path / "filtered.jsonl", rows_of(rb.COUNTS))


def test_equal_rewards_are_misses_and_counted_as_ties(fakes, context, benchmark_file):
    scorer = fakes.scorer(helpfulness(lambda prompt, response: 1.0))
    result = RewardBench(benchmark_file, resamples=QUICK).evaluate(scorer, context)
    figures = result["weightings"]["helpfulness_only"]
    assert figures["section_mean"]["value"] == 0.0
    for subset, cell in figures["subsets"].items():
        assert (cell["prompts"], cell["ties"], cell["right"]) == (rb.COUNTS[subset],) * 2 + (0,)
        assert cell["half_credit_accuracy"] == 0.5
    # "good" is longer than "bad", so the weighting that likes brevity is always wrong.
    assert result["weightings"]["brief"]["micro_average"]["value"] == 0.0
    assert result["weightings"]["longer_response"]["micro_average"]["value"] == 1.0


def test_one_pass_serves_every_weighting_and_later_ones_too(fakes, context, benchmark_file):
    scorer = fakes.scorer(helpfulness(lambda prompt, response: len(response)))
    bench = RewardBench(benchmark_file, resamples=QUICK)
    first = bench.evaluate(scorer, context)
    assert scorer.scored == 2985
    assert set(first["weightings"]) == {"helpfulness_only", "uniform", "brief", "longer_response"}
    again = bench.evaluate(scorer, replace(context, weightings=context.weightings[:1]))
    assert scorer.scored == 2985
    assert again["weightings"]["helpfulness_only"] == first["weightings"]["helpfulness_only"]


def test_figures_equal_a_plain_recount(fakes, context, benchmark_file):
    def luck(prompt, response):
        return zlib.crc32(f"{prompt}|{response}".encode()) % 5

    scorer = fakes.scorer(helpfulness(luck))
    result = RewardBench(benchmark_file, resamples=QUICK).evaluate(scorer, context)
    figures = result["weightings"]["helpfulness_only"]
    for subset in ("hep-go", "mt-bench-hard"):
        margins = [
            luck(f"{subset} {i}", "good") - luck(f"{subset} {i}", "bad")
            for i in range(rb.COUNTS[subset])
        ]
        cell = figures["subsets"][subset]
        assert cell["right"] == sum(margin > 0 for margin in margins)
        assert cell["wrong"] == sum(margin < 0 for margin in margins)
        assert cell["ties"] == sum(margin == 0 for margin in margins) > 0
        assert cell["accuracy"]["value"] == pytest.approx(cell["right"] / len(margins))
    for figure in (figures["section_mean"], *figures["sections"].values()):
        assert figure["low"] < figure["value"] < figure["high"]


def test_intervals_are_about_as_wide_as_theory_says(fakes, context, benchmark_file):
    scorer = fakes.scorer(helpfulness(lambda p, r: zlib.crc32(f"{p}|{r}".encode())))
    result = RewardBench(benchmark_file, resamples=400).evaluate(scorer, context)
    cell = result["weightings"]["helpfulness_only"]["subsets"]["math-prm"]["accuracy"]
    p = cell["value"]
    expected = 2 * 1.96 * np.sqrt(p * (1 - p) / 447)
    assert cell["high"] - cell["low"] == pytest.approx(expected, rel=0.2)


def test_prior_sets_add_the_leaderboard_score(fakes, context, benchmark_file, tmp_path, as_text):
    folder = tmp_path / "prior"
    folder.mkdir()
    for name in rb.PRIOR_SETS:
        rows = rows_of({name: 4}, *(("bad", "good") if name == "shp" else ("good", "bad")))
        for row in rows:
            # As in the Hub's splits: chat messages, and a column `subset` of another meaning.
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            row["subset"] = "askacademia"
        write(folder / f"{name}.jsonl", rows)
    bench = RewardBench(benchmark_file, prior_sets=str(folder), resamples=QUICK)
    scorer = fakes.scorer(helpfulness(lambda prompt, response: response == "good"))
    result = bench.evaluate(scorer, context)
    figures = result["weightings"]["helpfulness_only"]
    assert figures["section_mean"]["value"] == 1.0
    assert figures["prior_sets"]["value"] == 0.75
    assert figures["leaderboard_score"]["value"] == pytest.approx((8 + 0.75) / 9)
    assert "leaderboard" in as_text(bench.tables(result))


def test_missing_subsets_are_said_and_other_sections_still_computed(
    fakes, context, tmp_path, as_text
):
    counts = {subset: n for subset, n in rb.COUNTS.items() if subset != "donotanswer"}
    counts["hep-go"] = 3
    path = write(tmp_path / "some.jsonl", rows_of(counts))
    bench = RewardBench(path, resamples=QUICK)
    scorer = fakes.scorer(helpfulness(lambda prompt, response: response == "good"))
    result = bench.evaluate(scorer, context)
    figures = result["weightings"]["helpfulness_only"]
    assert figures["sections"]["Chat"]["value"] == 1.0
    for unknown in (figures["sections"]["Safety"], figures["section_mean"]):
        assert unknown["value"] is None
        assert unknown["not_computable"] == "no prompts of donotanswer"
    assert result["unusual_counts"] == {
        "donotanswer": {"found": 0, "usual": 136},
        "hep-go": {"found": 3, "usual": 164},
    }
    text = as_text(bench.tables(result))
    assert "Not computable" in text
    assert "no prompts of donotanswer" in " ".join(text.split())


def test_every_bad_row_is_listed_with_line_and_field(fakes, context, tmp_path):
    rows = rows_of({"hep-go": 6})
    rows[0]["subset"] = "hep-cobol"
    rows[1]["chosen"] = ""
    del rows[2]["rejected"]
    rows[3]["prompt"] = [{"role": "assistant", "content": "hello"}]
    rows[4]["prompt"] = 3
    path = write(tmp_path / "bad.jsonl", rows)
    scorer = fakes.scorer(helpfulness(lambda prompt, response: 0.0))
    with pytest.raises(DataError) as error:
        RewardBench(path, resamples=QUICK).evaluate(scorer, context)
    found = [(problem.line, problem.field) for problem in error.value.problems]
    assert found == [(1, "subset"), (2, "chosen"), (3, "rejected"), (4, "prompt"), (5, "prompt")]
    assert "hep-cobol" in str(error.value)
    assert scorer.scored == 0


def test_a_file_of_another_schema_is_told_once_and_not_by_row(fakes, context, tmp_path):
    path = write(tmp_path / "other.jsonl", [{"prompt": "a", "response": "b"}] * 50)
    scorer = fakes.scorer(helpfulness(lambda prompt, response: 0.0))
    with pytest.raises(DataError) as error:
        RewardBench(path, resamples=QUICK).evaluate(scorer, context)
    found = [(problem.line, problem.field) for problem in error.value.problems]
    assert found == [(None, "chosen"), (None, "rejected"), (None, "subset")]
    assert "found prompt, response" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\n", b"[1]\n"])
def test_files_that_hold_no_rows_are_refused(fakes, context, tmp_path, content):
    path = tmp_path / "filtered.jsonl"
    path.write_bytes(content)
    scorer = fakes.scorer(helpfulness(lambda prompt, response: 0.0))
    with pytest.raises(DataError, match=r"filtered\.jsonl"):
        RewardBench(str(path), resamples=QUICK).evaluate(scorer, context)


def test_without_network_the_hub_fails_at_once_and_names_the_local_way(
    fakes, context, monkeypatch, tmp_path
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    scorer = fakes.scorer(helpfulness(lambda prompt, response: 0.0))
    with pytest.raises(UserError, match=r"evaluators\.rewardbench\.path=.*filtered\.") as error:
        RewardBench("nobody/no-such-benchmark", resamples=QUICK).evaluate(scorer, context)
    assert "data.path" not in str(error.value)


def test_a_path_that_is_not_there_is_no_hub_id(fakes, context):
    scorer = fakes.scorer(helpfulness(lambda prompt, response: 0.0))
    with pytest.raises(UserError, match="no such file"):
        RewardBench("missing/filtered.parquet", resamples=QUICK).evaluate(scorer, context)


def test_tables_fit_100_columns(fakes, context, benchmark_file, as_text):
    bench = RewardBench(benchmark_file, resamples=QUICK)
    scorer = fakes.scorer(helpfulness(lambda p, r: zlib.crc32(f"{p}|{r}".encode()) % 9))
    names = ["helpsteer2_llama3_70b", "nemotron4_340b", "helpsteer2_rlhf", "a", "b", "c"]
    weightings = tuple(
        replace(context.weightings[i % 2], name=name) for i, name in enumerate(names)
    )
    result = bench.evaluate(scorer, replace(context, weightings=weightings))
    text = as_text(bench.tables(result))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for subset in rb.COUNTS:
        rows = [line for line in text.splitlines() if line.split()[:1] == [subset]]
        # Nothing is cut off at the right: every weighting has its figure.
        assert sum(len(re.findall(r"\d\.\d", row)) for row in rows) == len(names) + 1
    for weights in [*names, "longer_response"]:
        lines = [line for line in text.splitlines() if line.split()[:1] == [weights]]
        assert [len(re.findall(r"\d\.\d", line)) for line in lines] == [5, 4]


@pytest.mark.skipif(
    "HELPSTEER2_REAL_DATA" not in os.environ, reason="HELPSTEER2_REAL_DATA is unset"
)
def test_the_real_file_with_a_scorer_of_length(fakes, context):
    folder = Path(os.environ["HELPSTEER2_REAL_DATA"]) / "rewardbench"
    scorer = fakes.scorer(helpfulness(lambda prompt, response: float(len(response))))
    bench = RewardBench(str(folder), resamples=QUICK)
    result = bench.evaluate(scorer, context)
    assert result["pairs"] == scorer.scored == 2985
    assert result["unusual_counts"] == {}
    figures = result["weightings"]["helpfulness_only"]
    counts = {
        section: sum(figures["subsets"][subset]["prompts"] for subset in subsets)
        for section, subsets in rb.SECTIONS.items()
    }
    assert list(counts.values()) == [358, 456, 740, 1431]
    # Length is read as float32 scores and as exact counts: both must order every pair alike.
    assert figures == result["weightings"]["longer_response"]
    reverse = result["weightings"]["brief"]
    for subset, cell in figures["subsets"].items():
        assert cell["right"] == reverse["subsets"][subset]["wrong"]
        assert cell["right"] + cell["wrong"] + cell["ties"] == rb.COUNTS[subset]
    # RewardBench names these subsets as won by shorter and by longer answers.
    assert figures["subsets"]["llmbar-adver-GPTInst"]["accuracy"]["value"] < 0.5
    assert figures["subsets"]["alpacaeval-easy"]["accuracy"]["value"] > 0.5
