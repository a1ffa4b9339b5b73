from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpsteer2.errors import DataError, UserError
from helpsteer2.evaluation import rm_bench as rm
from helpsteer2.evaluation.rm_bench import RMBench

QUICK = 50

SOME = {"chat": 1, "math": 3, "code": 2, "safety-refuse": 1, "safety-response": 3}

# Chat, Math, Code, Safety | Easy, Normal, Hard | Overall, as printed in arXiv 2505.11475.
HELPSTEER3 = {
    "Principle": ((85.3, 81.9, 70.4, 96.9), (85.5, 84.9, 80.5), 83.6),
    "GenRM-Principle": ((80.4, 92.0, 77.0, 95.5), (88.9, 86.4, 83.4), 86.2),
    "Multilingual": ((86.2, 82.4, 66.8, 94.1), (86.5, 85.4, 80.0), 82.4),
    "English": ((75.4, 84.5, 69.3, 90.4), (92.1, 85.7, 71.1), 79.9),
    "Llama-3.1-Nemotron-70B": ((70.7, 64.3, 57.4, 90.3), (92.2, 76.8, 48.0), 70.7),
}
MICRO_DIFFICULTIES = {"Multilingual", "English", "Llama-3.1-Nemotron-70B"}


def rows_of(counts):
    return [
        {
            "id": i,
            "prompt": f"{domain} {i}",
            "chosen": [f"chosen {style}" for style in rm.STYLES],
            "rejected": [f"rejected {style}" for style in rm.STYLES],
            "domain": domain,
        }
        for domain, n in counts.items()
        for i in range(n)
    ]


def write(path, rows):
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return str(path)


def helpfulness(function):
    return lambda prompt, response: [function(prompt, response), 0, 0, 0, 0]


def by_style(chosen, rejected):
    """A reward for each style of the two lists."""
    table = {f"chosen {style}": reward for style, reward in zip(rm.STYLES, chosen, strict=True)}
    table |= {f"rejected {style}": r for style, r in zip(rm.STYLES, rejected, strict=True)}
    return helpfulness(lambda prompt, response: table[response])


@pytest.fixture
def evaluated(fakes, context):
    def evaluate(path, function, resamples=QUICK):
        bench = RMBench(str(path), resamples=resamples)
        result = bench.evaluate(fakes.scorer(function), context)
        return result, result["weightings"]["helpfulness_only"]

    return evaluate


@pytest.mark.parametrize("model", HELPSTEER3)
def test_published_overall_figures_are_the_mean_of_the_domains(model):
    domains, levels, overall = HELPSTEER3[model]
    accuracies = {
        subset: np.full((3, 3), value)
        for (_, subsets), value in zip(rm.DOMAINS.items(), domains, strict=True)
        for subset in subsets
    }
    macro, micro = rm.macro_average(accuracies), rm.pooled(accuracies)
    assert macro == pytest.approx(overall, abs=0.1001)  # printed figures are rounded
    # The columns of difficulties are under the one average in some rows, under the other in others.
    wanted, other = (micro, macro) if model in MICRO_DIFFICULTIES else (macro, micro)
    assert np.mean(levels) == pytest.approx(wanted, abs=0.1001)
    assert np.mean(levels) != pytest.approx(other, abs=1.0)


def test_published_difficulties_of_nemotron_340b_give_its_overall_figure():
    # arXiv 2410.16184: 69.5 from 81.0, 71.4 and 56.1.
    matrix = np.zeros((3, 3))
    for cells, value in zip(rm.DIFFICULTIES.values(), (81.0, 71.4, 56.1), strict=True):
        matrix[cells] = value
    assert rm.macro_average(dict.fromkeys(rm.COUNTS, matrix)) == pytest.approx(69.5, abs=0.05)


def test_counts_are_those_of_the_benchmark():
    assert sum(rm.COUNTS.values()) == 1327
    assert {d: sum(rm.COUNTS[s] for s in subsets) for d, subsets in rm.DOMAINS.items()} == {
        "chat": 129,
        "math": 529,
        "code": 228,
        "safety": 441,
    }


def test_difficulties_share_the_matrix_out():
    cells = np.stack(list(rm.DIFFICULTIES.values())).astype(int)
    assert (cells.sum(0) == 1).all()
    # Easy: the chosen response (the row) has the richer, that is the later style.
    assert rm.DIFFICULTIES["easy"][2, 0]
    assert rm.DIFFICULTIES["hard"][0, 2]


def test_the_matrix_by_hand(evaluated, tmp_path):
    path = write(tmp_path / "total_dataset.json", rows_of(SOME))
    result, figures = evaluated(path, by_style((1.0, 2.0, 3.0), (0.0, 2.0, 2.5)))
    assert [list(row.values()) for row in figures["styles"].values()] == [
        [1.0, 0.0, 0.0],
        [1.0, 0.0, 0.0],
        [1.0, 1.0, 1.0],
    ]
    for average in ("macro", "micro"):
        levels = {name: figure["value"] for name, figure in figures[average].items()}
        assert levels == pytest.approx({"easy": 1.0, "normal": 2 / 3, "hard": 0.0})
        assert figures[f"{average}_average"]["value"] == pytest.approx(5 / 9)
    assert result["prompts"] == 10
    chat = figures["subsets"]["chat"]
    assert (chat["prompts"], chat["comparisons"]) == (1, 9)
    assert (chat["right"], chat["wrong"], chat["ties"]) == (5, 3, 1)
    assert chat["half_credit_accuracy"] == pytest.approx(5.5 / 9)


def test_macro_weighs_domains_and_micro_weighs_prompts(evaluated, tmp_path):
    path = write(tmp_path / "total_dataset.json", rows_of(SOME))
    liked = ("chat", "safety-refuse")

    def reward(prompt, response):
        return float(response.startswith("chosen") == prompt.startswith(liked))

    _, figures = evaluated(path, helpfulness(reward))
    domains = {name: figure["value"] for name, figure in figures["domains"].items()}
    assert domains == {"chat": 1.0, "math": 0.0, "code": 0.0, "safety": 0.25}
    assert figures["macro_average"]["value"] == pytest.approx(1.25 / 4)
    assert figures["micro_average"]["value"] == pytest.approx(2 / 10)
    assert figures["macro"]["hard"]["value"] == pytest.approx(1.25 / 4)
    assert figures["micro"]["hard"]["value"] == pytest.approx(2 / 10)


def test_equal_rewards_are_misses_and_counted_as_ties(evaluated, tmp_path):
    path = write(tmp_path / "total_dataset.json", rows_of(SOME))
    result, figures = evaluated(path, helpfulness(lambda prompt, response: 1.0))
    assert figures["macro_average"]["value"] == figures["micro_average"]["value"] == 0.0
    for subset, cell in figures["subsets"].items():
        assert cell["ties"] == 9 * SOME[subset]
        assert cell["half_credit_accuracy"] == 0.5
    # "rejected …" is longer than "chosen …" of the same style; the style decides the rest.
    longer = result["weightings"]["longer_response"]["macro"]
    assert longer["normal"]["value"] == 0.0
    assert longer["easy"]["value"] == 1.0


def test_one_pass_serves_every_weighting_and_later_ones_too(fakes, context, tmp_path):
    bench = RMBench(write(tmp_path / "total_dataset.json", rows_of(SOME)), resamples=QUICK)
    scorer = fakes.scorer(helpfulness(lambda prompt, response: len(response)))
    first = bench.evaluate(scorer, context)
    assert scorer.scored == 10  # a prompt is scored once, with its six responses
    assert set(first["weightings"]) == {"helpfulness_only", "uniform", "brief", "longer_response"}
    again = bench.evaluate(scorer, replace(context, weightings=context.weightings[:1]))
    assert scorer.scored == 10
    assert again["weightings"]["helpfulness_only"] == first["weightings"]["helpfulness_only"]


def test_figures_equal_a_plain_recount(evaluated, tmp_path):
    def luck(prompt, response):
        return zlib.crc32(f"{prompt}|{response}".encode()) % 7

    counts = {"chat": 20, "math": 30, "code": 10, "safety-refuse": 25, "safety-response": 15}
    rows = rows_of(counts)
    _, figures = evaluated(write(tmp_path / "total_dataset.json", rows), helpfulness(luck))
    matrices = {domain: [] for domain in rm.DOMAINS}
    for row in rows:
        wins = [
            [luck(row["prompt"], chosen) > luck(row["prompt"], bad) for bad in row["rejected"]]
            for chosen in row["chosen"]
        ]
        matrices[row["domain"].partition("-")[0]].append(wins)
    means = {domain: np.mean(found, axis=0) for domain, found in matrices.items()}
    for domain, matrix in means.items():
        assert figures["domains"][domain]["value"] == pytest.approx(matrix.mean())
    hard = [(m[0, 1] + m[0, 2] + m[1, 2]) / 3 for m in means.values()]
    assert figures["macro"]["hard"]["value"] == pytest.approx(np.mean(hard))
    normal = np.mean([np.diag(wins).mean() for found in matrices.values() for wins in found])
    assert figures["micro"]["normal"]["value"] == pytest.approx(normal)
    for figure in (figures["macro_average"], *figures["micro"].values()):
        assert figure["low"] < figure["value"] < figure["high"]


def test_a_prompt_takes_all_its_comparisons_along_in_the_bootstrap(evaluated, tmp_path):
    """Nine comparisons of one prompt that agree are one observation, not nine."""
    counts = dict.fromkeys(rm.COUNTS, 100)

    def half(prompt, response):
        return float(response.startswith("chosen") == (int(prompt.split()[1]) < 50))

    path = write(tmp_path / "total_dataset.json", rows_of(counts))
    _, figures = evaluated(path, helpfulness(half), resamples=400)
    chat = figures["domains"]["chat"]
    expected = 2 * 1.96 * np.sqrt(0.25 / 100)
    assert chat["high"] - chat["low"] == pytest.approx(expected, rel=0.2)


def test_every_kind_of_file_gives_the_same_figures(evaluated, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = rows_of(SOME)
    paths = [write(tmp_path / "any_name.json", rows)]
    compressed = tmp_path / "all.json.gz"
    compressed.write_bytes(gzip.compress(json.dumps(rows).encode()))
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole / "total_dataset.json", rows)
    domains = tmp_path / "repository"
    (domains / "data").mkdir(parents=True)
    for domain in rm.COUNTS:
        published = [row for row in rows if row["domain"] == domain]
        named = [{key: row[key] for key in row if key != "domain"} for row in published]
        write(domains / "data" / f"{domain}_filtered.json", named)

    function = by_style((1.0, 2.0, 3.0), (0.0, 2.0, 2.5))
    results = [
        evaluated(p, function)[0] for p in (*paths, compressed, lines, table, whole, domains)
    ]
    assert all(result == results[0] for result in results)


def test_missing_domains_are_said_and_others_still_computed(evaluated, tmp_path, as_text):
    folder = tmp_path / "some"
    folder.mkdir()
    for domain in ("chat", "safety-refuse"):
        write(folder / f"{domain}_filtered.json", rows_of({domain: 2}))
    result, figures = evaluated(folder, helpfulness(lambda p, r: float(r.startswith("chosen"))))
    assert figures["domains"]["chat"]["value"] == 1.0
    assert figures["domains"]["safety"]["value"] is None
    assert figures["domains"]["safety"]["not_computable"] == "no prompts of safety-response"
    assert figures["macro_average"]["value"] is None
    assert figures["micro_average"]["value"] is None
    assert figures["subsets"]["safety-refuse"]["accuracy"]["value"] == 1.0
    assert figures["styles"]["concise"]["concise"] is None
    assert result["unusual_counts"]["math"] == {"found": 0, "usual": 529}
    text = as_text(RMBench().tables(result))
    assert "no prompts of math, code, safety-response" in " ".join(text.split())
    # No column is cut off at the right.
    overall = next(line for line in text.splitlines() if line.split()[:1] == ["uniform"])
    assert overall.split() == ["uniform", "–", "100.0", "–", "–", "–", "–", "0"]


def test_every_bad_row_is_listed_with_line_and_field(fakes, context, tmp_path):
    rows = rows_of({"chat": 7})
    rows[0]["domain"] = "cooking"
    rows[1]["chosen"] = ["only one"]
    del rows[2]["rejected"]
    rows[3]["rejected"][1] = ""
    rows[4]["prompt"] = 3
    rows[5] = "no row"
    path = tmp_path / "total_dataset.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    scorer = fakes.scorer(helpfulness(lambda prompt, response: 0.0))
    with pytest.raises(DataError) as error:
        RMBench(str(path), resamples=QUICK).evaluate(scorer, context)
    found = [(problem.line, problem.field) for problem in error.value.problems]
    # Rows are looked at a few at a time, so what is no row at all comes first.
    assert sorted(found, key=str) == sorted(
        [
            (2, "domain"), (3, "chosen"), (4, "rejected"), (5, "rejected[1]"), (6, "prompt"),
            (7, None),
        ],
        key=str,
    )  # fmt: skip
    assert "cooking" in str(error.value)
    assert scorer.scored == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value|array of rows"),
        (b"{}", "array of rows"),
        (b"[]", "the array is empty"),
        (b'[\n{"a": 1}\n{"a": 2}]', "expected a comma"),
        (b'[\n{"a": 1},\n{"a": ]', ":3: not valid JSON"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read|not valid JSON"),
        (b'[{"prompt": "a", "response": "b"}]', "domain: the column is missing; found prompt"),
    ],
)
def test_files_that_cannot_be_used_are_refused(fakes, context, tmp_path, content, message):
    path = tmp_path / "total_dataset.json"
    path.write_bytes(content)
    scorer = fakes.scorer(helpfulness(lambda prompt, response: 0.0))
    with pytest.raises(DataError, match=message) as error:
        RMBench(str(path), resamples=QUICK).evaluate(scorer, context)
    assert "total_dataset.json" in str(error.value)


def test_a_truncated_gzip_file_is_told(fakes, context, tmp_path):
    path = tmp_path / "total_dataset.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows_of(SOME)).encode())[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        RMBench(str(path)).evaluate(fakes.scorer(helpfulness(lambda p, r: 0.0)), context)


def test_a_folder_without_the_files_names_them(fakes, context, tmp_path):
    scorer = fakes.scorer(helpfulness(lambda prompt, response: 0.0))
    with pytest.raises(UserError, match=r"total_dataset\.json nor any of chat_filtered\.json"):
        RMBench(str(tmp_path)).evaluate(scorer, context)


def test_without_network_the_hub_fails_at_once_and_names_the_local_way(
    fakes, context, monkeypatch, tmp_path
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    scorer = fakes.scorer(helpfulness(lambda prompt, response: 0.0))
    with pytest.raises(UserError, match=r"evaluators\.rm_bench\.path=DIR.*total_dataset") as error:
        RMBench("nobody/no-such-benchmark").evaluate(scorer, context)
    assert "data.path" not in str(error.value)


def test_tables_fit_100_columns(fakes, context, tmp_path, as_text):
    counts = dict.fromkeys(rm.COUNTS, 12)
    bench = RMBench(write(tmp_path / "total_dataset.json", rows_of(counts)), resamples=QUICK)
    scorer = fakes.scorer(helpfulness(lambda p, r: zlib.crc32(f"{p}|{r}".encode()) % 9))
    names = ["helpsteer2_llama3_70b", "nemotron4_340b", "helpsteer2_rlhf", "a", "b", "c"]
    weightings = tuple(replace(context.weightings[0], name=name) for name in names)
    result = bench.evaluate(scorer, replace(context, weightings=weightings))
    text = as_text(bench.tables(result))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for weights in [*names, "longer_response"]:
        lines = [line for line in text.splitlines() if line.split()[:1] == [weights]]
        # Domains, difficulties, and the first of three rows of styles.
        assert [len(re.findall(r"\d\.\d", line)) for line in lines] == [6, 6, 3]
    assert set(bench.headlines(result)) >= {"a, overall %", "a, micro %"}


@pytest.mark.skipif(
    "HELPSTEER2_REAL_DATA" not in os.environ, reason="HELPSTEER2_REAL_DATA is unset"
)
def test_the_real_files_with_a_scorer_of_length(evaluated):
    folder = Path(os.environ["HELPSTEER2_REAL_DATA"]) / "rm_bench"  # without math
    result, figures = evaluated(folder, helpfulness(lambda prompt, response: float(len(response))))
    assert result["prompts"] == 798
    assert result["unusual_counts"] == {"math": {"found": 0, "usual": 529}}
    assert figures == result["weightings"]["longer_response"]
    assert figures["macro_average"]["not_computable"] == "no prompts of math"
    for domain in ("chat", "code", "safety"):
        assert 0.0 < figures["domains"][domain]["value"] < 1.0
    # Detailed responses are longer than concise ones, which is what makes the benchmark hard.
    for subset in ("chat", "code", "safety-refuse", "safety-response"):
        cell = figures["subsets"][subset]
        assert cell["right"] + cell["wrong"] + cell["ties"] == 9 * rm.COUNTS[subset]
