"""The entropies of a policy are those of plain transformers' logits."""

from __future__ import annotations

import torch
from torch.distributions import Categorical
from transformers import PreTrainedTokenizerFast

from helpsteer2.data.packing import pack
from tests.generation.local_policies import make_policy, plain_model

from .packed_reference import make_groups


def test_entropies_are_those_that_the_response_tokens_were_chosen_from(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    policy, groups = make_policy(tokenizer), make_groups([2, 1, 3])
    batch = pack(groups, multiple=64)
    found = policy.response_logprobs(batch, entropy=True)
    plain, expected = plain_model(policy), []
    for group in groups:
        for response in group.response_ids:
            ids = torch.tensor([*group.prompt_ids, *response])
            logits = plain(ids[None]).logits[0, len(group.prompt_ids) - 1 : -1]
            expected.append(Categorical(logits=logits).entropy())
    whole = torch.cat(expected)
    assert found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.entropy, whole, rtol=0, atol=1e-4)
    plainly = policy.response_logprobs(batch)
    assert plainly.entropy is None
    assert torch.equal(found.logprobs, plainly.logprobs)
    weight = policy.lm_head.weight
    ours = torch.autograd.grad(found.entropy.sum(), weight)[0]
    theirs = torch.autograd.grad(whole.sum(), plain.get_output_embeddings().weight)[0]
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
