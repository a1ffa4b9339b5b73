"""Steps are exact: every group once an epoch, the same steps on any number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpsteer2.data.planner import StepPlan, consecutive_bins, pack_bins, steps_for_epochs
from helpsteer2.errors import UserError


def make_plan(groups: int = 103, world_size: int = 1, **options: int) -> StepPlan:
    lengths = np.random.default_rng(0).integers(5, 400, groups)
    values = {"global_batch": 16, "tokens_per_microbatch": 900, "total_steps": 25, "seed": 3}
    return StepPlan(lengths, world_size=world_size, **{**values, **options})


def test_every_group_comes_once_an_epoch_across_step_borders() -> None:
    plan = make_plan(groups=103, total_steps=26)
    stream = np.concatenate([plan.groups(step) for step in range(26)])
    for epoch in range(4):
        assert sorted(stream[epoch * 103 : (epoch + 1) * 103]) == list(range(103))
    assert list(stream[:103]) != list(stream[103:206])


def test_a_step_is_the_same_whoever_asks_and_when() -> None:
    forward = [make_plan().groups(step).tolist() for step in range(25)]
    plan = make_plan()
    assert [plan.groups(step).tolist() for step in reversed(range(25))] == forward[::-1]
    assert make_plan(seed=4).groups(0).tolist() != forward[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
@pytest.mark.parametrize("budget", [1, 500, 900, 10**9])
def test_ranks_share_a_step_evenly(world_size: int, budget: int) -> None:
    plan = make_plan(world_size=world_size, tokens_per_microbatch=budget)
    for step in range(8):
        ranks = plan.step(step)
        assert len(ranks) == world_size
        assert len({len(batches) for batches in ranks}) == 1
        counted = [g for batches in ranks for b in batches if b.counted for g in b.groups]
        assert sorted(counted) == sorted(plan.groups(step))
        for batches in ranks:
            for batch in batches:
                assert len(batch.groups) == 1 or plan.lengths[list(batch.groups)].sum() <= budget


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=60),
    st.integers(1, 2000),
    st.integers(1, 4),
)
def test_bins_hold_every_item_once_within_budget(
    lengths: list[int], budget: int, ranks: int
) -> None:
    array = np.array(lengths)
    bins = pack_bins(array, budget, ranks)
    assert Counter(i for b in bins for i in b) == Counter(range(len(lengths)))
    assert all(bins)
    assert all(len(b) == 1 or array[b].sum() <= budget for b in bins)


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 2000))
def test_consecutive_bins_keep_order(lengths: list[int], budget: int) -> None:
    bins = list(consecutive_bins(lengths, budget))
    assert [i for b in bins for i in b] == list(range(len(lengths)))
    assert all(len(b) == 1 or sum(lengths[i] for i in b) <= budget for b in bins)


def test_the_paper_takes_317_steps() -> None:
    assert steps_for_epochs(10_162, 64, 2) == (317, 36)


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(UserError, match="global_batch"):
        make_plan(groups=10)
    with pytest.raises(UserError, match="ranks"):
        make_plan(world_size=17)
