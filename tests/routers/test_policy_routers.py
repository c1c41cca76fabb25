"""RL-R and Routing Networks: REINFORCE against enumeration and finite formulas."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsify.routers.policy_routers import RLRouter, RoutingNetworkRouter


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_inference_takes_the_most_likely(num_tokens: int) -> None:
    """Protects: argmax with weight 1, not scaled by its probability; no draw."""
    router, x = RLRouter(7, 5, 1).eval(), torch.randn(num_tokens, 7)
    weights, ids = router(x)
    expected = [max(range(5), key=lambda e: float(router.weight[e].double() @ token.double())) for token in x]
    assert ids[:, 0].tolist() == expected
    assert weights.eq(1).all()


def test_training_draws_from_the_policy() -> None:
    """Protects: actions follow the softmax of the logits: frequencies within 4 standard errors."""
    torch.manual_seed(0)
    router = RLRouter(3, 4, 1)
    router.weight.data.normal_()
    x = torch.randn(1, 3).expand(20000, 3)
    chances = torch.softmax(x[0] @ router.weight.t(), -1)
    found = torch.bincount(router(x)[1][:, 0], minlength=4) / 20000
    assert ((found - chances).abs() <= 4 * (chances * (1 - chances) / 20000).sqrt()).all()


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_two_armed_bandit(baseline: float) -> None:
    """Protects: the expected gradient of logit a is -pi(a) (r_a - E r), and a baseline does not change it."""
    router = RLRouter(3, 2, 1).double()
    router.weight.data.normal_()
    x, rewards = torch.randn(1, 3, dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64)
    chances = torch.softmax((x @ router.weight.t())[0], -1).detach()
    expected = -(chances * (rewards - (chances * rewards).sum())).unsqueeze(1) * x
    total = torch.zeros_like(router.weight)
    for action in range(2):
        router.baseline.fill_(baseline)
        router.log_chances = torch.log_softmax((x @ router.weight.t())[0], -1)[action].view(1)
        router.give_reward(rewards[action])
        total += chances[action] * torch.autograd.grad(router.aux_loss(), router.weight)[0]
    torch.testing.assert_close(total, expected)


def test_rewards_for_tokens_sequences_and_calls() -> None:
    """Protects: which token a reward belongs to, and the baseline of the rewards before."""
    router, x = RLRouter(3, 2, 1), torch.randn(6, 3)
    router(x)
    chances = router.log_chances
    assert chances is not None
    router.give_reward(torch.tensor([1.0, -2.0]))
    expected = -(chances * torch.tensor([1.0, 1, 1, -2, -2, -2])).mean()
    torch.testing.assert_close(router.losses["policy"], expected)
    assert float(router.baseline) == pytest.approx(-0.5)
    router(x)
    chances = router.log_chances
    assert chances is not None
    router.give_reward(torch.tensor(1.0))
    torch.testing.assert_close(router.losses["policy"], -(chances * 1.5).mean())
    assert float(router.baseline) == pytest.approx(0.9 * -0.5 + 0.1)


def test_learns_the_better_arm() -> None:
    """Protects: the sign of the policy gradient."""
    torch.manual_seed(0)
    router, x = RLRouter(3, 3, 1), torch.randn(64, 3) + 1
    optimizer = torch.optim.SGD(router.parameters(), lr=0.5)
    for _ in range(100):
        _, ids = router(x)
        router.give_reward((ids[:, 0] == 1).float())
        optimizer.zero_grad()
        router.aux_loss().backward()
        optimizer.step()
    assert (router.eval()(x)[1] == 1).float().mean() > 0.9


def test_an_action_may_pass() -> None:
    """Protects: the action behind the last expert runs none, and the start is then not said to be exact."""
    router, x = RoutingNetworkRouter(3, 2, 1, pass_through=True).eval(), torch.ones(2, 3)
    router.weight.data.copy_(torch.tensor([[0.0], [0.0], [1.0]]).expand(3, 3))
    assert router(x)[1].tolist() == [[-1], [-1]]
    assert router.start_sum is None
    assert RoutingNetworkRouter(3, 2, 1).start_sum == 1


def test_collaboration_rewards_agreement() -> None:
    """Protects: the mean probability of the action that a token took is added to its reward."""
    router, x = RoutingNetworkRouter(3, 2, 1, collaboration=0.3), torch.randn(4, 3)
    router.weight.data.normal_()
    _, ids = router(x)
    chances = router.log_chances
    assert chances is not None
    mean = torch.softmax(x @ router.weight.t(), -1).mean(0)[ids[:, 0]].detach()
    router.give_reward(torch.tensor(1.0))
    torch.testing.assert_close(router.losses["policy"], -(chances * (1 + 0.3 * mean)).mean())


def test_refusals_and_copies() -> None:
    """Protects: a reward without a call, or for other tokens, is told; a router that waits for one can be copied."""
    router = RLRouter(3, 2, 1)
    with pytest.raises(RuntimeError, match="run the model in train"):
        router.give_reward(torch.tensor(1.0))
    router(torch.randn(4, 3))
    assert copy.deepcopy(router).log_chances is None
    with pytest.raises(ValueError, match="3 rewards do not fit 4 tokens"):
        router.give_reward(torch.ones(3))
    with pytest.raises(ValueError, match="give top_k=1"):
        RLRouter(3, 2, 2)
