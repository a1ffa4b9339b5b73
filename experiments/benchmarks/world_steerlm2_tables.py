"""What ``world_steerlm2`` has found, as tables, and which claims hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES

Figure = Mapping[str, Any]
"""``value``, ``low`` and ``high``; None where they are not known."""

STEERED_WELL = 0.8
GAP_CLOSED = 0.25


def claims(seeds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What SteerLM 2.0 should do, with the figure that tells, seed by seed.

    Args:
        seeds: Figures by seed.

    Returns:
        Of each claim its text, by seed ``figure`` and ``holds``, and whether it holds in ``all``.
    """
    last = "iteration 2"

    def above(figure: Figure) -> bool:
        return figure["low"] is not None and figure["low"] > 0

    def below(figure: Figure) -> bool:
        return figure["high"] is not None and figure["high"] < 0

    def at_least(bound: float) -> Callable[[Figure], bool]:
        return lambda figure: figure["value"] is not None and figure["value"] >= bound

    def spearman(name: str) -> Callable[[Mapping[str, Any]], Figure]:
        return lambda run: run["steerability"][last]["attributes"][name]["spearman"]

    def gain(name: str) -> Callable[[Mapping[str, Any]], Figure]:
        return lambda run: run["policies"][name]["gain_on_the_one_before"]

    table: Sequence[tuple[str, Callable[[Any], Figure], Callable[[Figure], bool]]] = [
        ("score: iteration 2 − iteration 1 > 0", gain(last), above),
        ("score: iteration 1 − SteerLM > 0", gain("iteration 1"), above),
        (
            f"iteration 2 closes >= {GAP_CLOSED:.0%} of SFT's gap",
            lambda run: run["policies"][last]["gap_closed"],
            at_least(GAP_CLOSED),
        ),
        *(
            (f"Spearman of {name} >= {STEERED_WELL}", spearman(name), at_least(STEERED_WELL))
            for name in ("verbosity", "complexity")
        ),
        (
            "mean |asked − got|: iteration 2 − SteerLM < 0",
            lambda run: run["steerability"][last]["gap_difference"],
            below,
        ),
    ]
    found = []
    for text, figure_of, holds in table:
        figures = {seed: figure_of(run) for seed, run in seeds.items()}
        by_seed = {
            seed: {"figure": dict(figure), "holds": holds(figure)}
            for seed, figure in figures.items()
        }
        all_hold = all(of["holds"] for of in by_seed.values())
        found.append({"claim": text, "seeds": by_seed, "all": all_hold})
    return found


def told(figure: Figure, sign: str = "", digits: int = 3) -> str:
    """A figure with its interval on one line."""
    ends = [figure[key] for key in ("value", "low", "high")]
    value, low, high = ("–" if end is None else f"{end:{sign}.{digits}f}" for end in ends)
    return value if figure["low"] is None else f"{value} [{low}, {high}]"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _table(title: str, columns: Sequence[str]) -> Table:
    made = Table(title=title)
    for column in columns:
        made.add_column(column)
    return made


def claims_table(seeds: Mapping[str, Any]) -> Table:
    """Each claim, with yes or no for every seed."""
    made = _table("claims", ["", *(f"seed {seed}" for seed in seeds), "all"])
    for claim in claims(seeds):
        cells = [
            f"{_yes(of['holds'])}: {told(of['figure'], '+')}" for of in claim["seeds"].values()
        ]
        made.add_row(claim["claim"], *cells, _yes(claim["all"]))
    return made


def steering_table(seeds: Mapping[str, Any]) -> Table:
    """How closely levels are followed, and what moves beside: a row a policy of every seed."""
    columns = ["seed", "policy", "mean gap", "gap − SteerLM's", "cross-talk"]
    columns += [f"ρ {name}" for name in HELPSTEER2_ATTRIBUTES]
    made = _table("asked and got: ρ is Spearman's, gap mean |asked − got|", columns)
    for seed, run in seeds.items():
        for name, of in run["steerability"].items():
            correlations = [of["attributes"][key]["spearman"] for key in HELPSTEER2_ATTRIBUTES]
            made.add_row(
                *(seed, name, told(of["gap"], digits=2)),
                told(of["gap_difference"], "+", digits=2),
                told(of["cross_talk"], digits=2),
                *("–" if of["value"] is None else f"{of['value']:.2f}" for of in correlations),
            )
    return made


def weights_table(seeds: Mapping[str, Any]) -> Table:
    """What an iteration learned from, and how far it got: a row an iteration of every seed."""
    columns = ["seed", "iteration", "effective samples", "largest weight", "one weight > .9", "D"]
    columns += ["first step", "last step", "last eighth", "start there", "seconds"]
    made = _table("weights: D, their KL from the policy, in nats, and D in training", columns)
    for seed, run in seeds.items():
        for number, of in run["iterations"].items():
            training = of["training"]
            seconds = sum(
                spent
                for stage, spent in run["stage_seconds"].items()
                if stage.endswith(f"_{number}")
            )
            made.add_row(
                *(seed, number, f"{of['effective_samples']['mean']:.2f}"),
                *(f"{of['largest_weight']:.2f}", f"{of['collapsed']:.1%}", f"{of['distance']:.3f}"),
                *(f"{value:.3f}" for value in training.values()),
                f"{seconds:.0f}",
            )
    return made


def likelihood_table(seeds: Mapping[str, Any]) -> Table:
    """The attribute likelihood of the reward models: a row a reading of every seed."""
    columns = ["seed", "reading", "−log P at 24", "fitted", "fitted concentration", "marginal"]
    made = _table("label likelihood of the reward model, all attributes, nats a rating", columns)
    for seed, run in seeds.items():
        figures = run["likelihood"]["all"]
        for key, of in figures["readings"].items():
            cells = (of["nll"], of["nll_fitted"], of["concentration"])
            marginal = told(figures["predictors"]["marginal"])
            made.add_row(seed, key, *map(told, cells), marginal)
    return made


TABLES = (steering_table, weights_table, likelihood_table, claims_table)
