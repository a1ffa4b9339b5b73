"""The reference that divergences are measured from, and what the critic starts from."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpsteer2.commands.train import train
from helpsteer2.data.packing import PackedBatch, pack
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.critic import CriticStart
from helpsteer2.models.lora import Lora
from helpsteer2.models.policy import Policy
from helpsteer2.models.reward import RewardModel, RewardSpec
from helpsteer2.rewards.scorer import RewardScorer
from helpsteer2.rollouts.advantages import AgainstBaseline
from helpsteer2.rollouts.reference import ReferencePolicy
from tests.models.adapters import wake
from tests.rollouts.runs import Run, iteration, make
from tests.rollouts.test_steps import trained
from tests.training.runs import SHAPE, arguments
from tests.training.test_resume import assert_same

LORA = Lora(rank=4, target_modules="all-linear")


def open_policy(path: str) -> Policy:
    return Policy.from_pretrained(path)[0]


def with_adapters(path: str) -> Policy:
    """The policy beside adapters that do something."""
    policy = open_policy(path)
    LORA.inject(policy.backbone, seed=0)
    wake(policy.backbone)
    return policy.eval()


def batch_of(path: str, folder: Path) -> PackedBatch:
    rollouts = make(folder, path, AgainstBaseline())
    return pack([rollouts[i] for i in range(3)])


def logprobs(policy: Policy, batch: PackedBatch) -> torch.Tensor:
    with torch.no_grad():
        return policy.response_logprobs(batch).logprobs


def test_the_start_stays_what_it_was(tmp_path: Path, policy: str) -> None:
    batch, start = batch_of(policy, tmp_path), open_policy(policy)
    before = logprobs(start, batch)
    reference = ReferencePolicy(start, None, "cpu", "auto", offload=False)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.mul_(1.1)
    with reference.ready(start) as found:
        assert torch.equal(logprobs(found, batch), before)
        assert not any(p.requires_grad for p in found.parameters())
        assert not found.training
    assert not torch.allclose(logprobs(start, batch), before, atol=0.01)


def held_bytes() -> int:
    """Of all tensors that live; others than plain ones, of other tests, may have no memory."""
    gc.collect()
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in gc.get_objects()
        if type(one) in (torch.Tensor, torch.nn.Parameter)
    }
    return sum(storages.values())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_go_away_and_nothing_is_copied(tmp_path: Path, policy: str) -> None:
    batch, base = batch_of(policy, tmp_path), open_policy(policy)
    trains = with_adapters(policy)
    own = logprobs(trains, batch)
    before = held_bytes()
    reference = ReferencePolicy(trains, None, "cpu", "auto", offload=False)
    assert reference.model is None
    with reference.ready(trains) as found:
        assert torch.equal(logprobs(found, batch), logprobs(base, batch))
        assert held_bytes() <= before + 4096  # a copy would have tens of thousands
    assert sum(p.numel() * 4 for p in base.parameters()) > 20_000
    assert torch.equal(logprobs(trains, batch), own)
    assert not torch.allclose(own, logprobs(base, batch), atol=0.01)


def test_a_run_of_adapters_measures_from_its_base(tmp_path: Path, policy: str) -> None:
    """The second iteration's reference is what the policy was in the beginning; nothing drops."""
    lora = replace(LORA, dropout=0.3)
    Run(policy, "reinforce", max_steps=5, lora=lora).train(tmp_path / "run")
    rollouts = iteration(tmp_path / "run", 1)
    assert rollouts.metrics["rollout/sampler_gap_max"] < 1e-4
    batch = pack([rollouts[i] for i in range(len(rollouts))])
    assert batch.rollout is not None
    expected = logprobs(open_policy(policy), batch)
    assert torch.allclose(batch.rollout.ref_logprobs, expected, atol=1e-5)
    assert (batch.rollout.logprobs - expected).abs().max() > 1e-3


def test_the_reference_may_be_another_policy(
    tmp_path: Path, policy: str, other_policy: str
) -> None:
    Run(policy, "reinforce", max_steps=5, rollouts={"reference": other_policy}).train(
        tmp_path / "run"
    )
    for number in (0, 1):
        rollouts = iteration(tmp_path / "run", number)
        batch = pack([rollouts[i] for i in range(len(rollouts))])
        assert batch.rollout is not None
        expected = logprobs(open_policy(other_policy), batch)
        assert torch.allclose(batch.rollout.ref_logprobs, expected, atol=1e-5)


def policy_of_other_ids(folder: Path) -> str:
    """A policy whose tokenizer has more tokens."""
    given = arguments(folder / "sft", module="sft", max_steps=1, validate_every=None,
                      optimized_metric=None)  # fmt: skip
    other = Backbone(TrainedTokenizer(280), init="random", config=SHAPE)
    train(**given | {"backbone": other})
    return str(folder / "sft/export")


def test_a_reference_of_another_tokenizer_is_refused(tmp_path: Path, policy: str) -> None:
    other = policy_of_other_ids(tmp_path)
    with pytest.raises(UserError, match=r"rollouts\.reference=.* has another tokenizer"):
        Run(policy, "reinforce", rollouts={"reference": other}).train(tmp_path / "run")
    assert not (tmp_path / "run/rollouts").exists()


@pytest.mark.parametrize("lora", [None, LORA])
def test_models_that_wait_elsewhere_say_the_same(
    tmp_path: Path, policy: str, lora: Lora | None
) -> None:
    for offload in (False, True):
        run = Run(policy, max_steps=8, lora=lora, rollouts={"offload": offload})
        run.train(tmp_path / str(offload))
    assert_same(*(trained(tmp_path / str(offload)) for offload in (False, True)))


def reward_model_of(policy: str, folder: Path, seed: int = 0) -> str:
    """A reward model on the decoder of a policy, as it might have been trained from it."""
    start = open_policy(policy)
    torch.manual_seed(seed)
    for parameter in start.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    chat = start.spec.chat
    spec = RewardSpec.of(("letters", "length"), chat, chat.tokenizer, start.spec.limits, "toy")
    RewardModel(start.backbone, spec).save_pretrained(folder, chat.tokenizer)
    return str(folder)


def backbone_of(path: str) -> dict[str, torch.Tensor]:
    return RewardScorer.from_pretrained(path).model.backbone.state_dict()


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_critic_starts_from_a_reward_model(
    tmp_path: Path, policy: str, lora: Lora | None
) -> None:
    path = reward_model_of(policy, tmp_path / "reward")
    critic = CriticStart(path, lora).build(open_policy(policy), seed=0)
    batch = batch_of(policy, tmp_path / "rollouts")
    assert not critic(batch).any()  # the head is new
    found = critic.backbone.state_dict()
    theirs = backbone_of(path)
    for name, weight in theirs.items():
        ours = (
            found[name] if name in found else found[name.replace(".weight", ".base_layer.weight")]
        )
        assert torch.equal(ours, weight), name
    training = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("head") for name in training) == bool(lora)
    assert {"head.weight", "head.bias"} < training


def test_a_critic_of_another_tokenizer_is_refused(tmp_path: Path, policy: str) -> None:
    path = reward_model_of(policy_of_other_ids(tmp_path), tmp_path / "reward")
    run = Run(policy, module={"critic": CriticStart(path)})
    with pytest.raises(UserError, match=r"module\.critic\.init_from=.* has another tokenizer"):
        run.train(tmp_path / "run")


@pytest.mark.parametrize("adapted", [False, True])
def test_a_critic_starts_from_the_policy(tmp_path: Path, policy: str, adapted: bool) -> None:
    start = with_adapters(policy) if adapted else open_policy(policy)
    critic = CriticStart(gradient_checkpointing=True).build(start, seed=0)
    ours, theirs = critic.backbone.state_dict(), start.backbone.state_dict()
    assert_same(dict(ours), dict(theirs))
    shared = {p.data_ptr() for p in critic.parameters()} & {
        p.data_ptr() for p in start.parameters()
    }
    assert not shared
    trains = [name for name, p in critic.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trains if not name.startswith("head")) == adapted


def test_values_are_read_before_each_token(tmp_path: Path, policy: str) -> None:
    """A value does not know the token that comes, nor any other response."""
    start = open_policy(policy)
    critic = CriticStart().build(start, seed=0).eval()
    torch.nn.init.normal_(critic.head.weight)
    rollouts = make(tmp_path, policy, AgainstBaseline())
    group = next(rollouts[i] for i in range(8) if min(map(len, rollouts[i].response_ids)) > 1)
    with torch.no_grad():
        values = critic(pack([group])).split([len(ids) for ids in group.response_ids])
        for i, ids in enumerate(group.response_ids):
            changed = ids.copy()
            changed[-1] = 5 if changed[-1] != 5 else 6
            alone = replace(group, response_ids=(changed,), attributes=group.attributes[:1],
                            rollout=None)  # fmt: skip
            assert torch.allclose(critic(pack([alone])), values[i], atol=1e-5)


def test_nothing_of_a_reference_outlives_its_run(policy: str) -> None:
    start = open_policy(policy)
    reference = ReferencePolicy(start, None, "cpu", "auto", offload=True)
    assert reference.model is not None
    held = weakref.ref(reference.model)
    with reference.ready(start):
        pass
    del reference
    gc.collect()
    assert held() is None
