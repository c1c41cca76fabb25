"""`choice_loss`: gains are exact, and descending on it finds the better experts."""

from __future__ import annotations

import torch

from sparsify.passes.split.choice_loss import choice_gains, choice_loss, choose


def test_a_gain_is_the_change_of_the_squared_error() -> None:
    """Protects: the formula, for experts that ran and for others."""
    added, target = torch.randn(5, 4, 3), torch.randn(5, 3)  # [T, R, D_out]
    chosen = choose(torch.randn(5, 4), 2)
    error = target - (chosen.unsqueeze(2) * added).sum(1)
    gains = choice_gains((added @ error.unsqueeze(2)).squeeze(2), added.square().sum(2), chosen)
    for e in range(4):
        without, running = (chosen.clone().index_fill_(1, torch.tensor([e]), value) for value in (0.0, 1.0))
        errors = [(target - (c.unsqueeze(2) * added).sum(1)).square().sum(1) for c in (without, running)]
        torch.testing.assert_close(gains[:, e], errors[0] - errors[1])


def test_descent_moves_the_worthy_experts_over_the_threshold() -> None:
    """Protects: the direction of the lesson."""
    gains = torch.tensor([[0.1, 3.0, -1.0, 2.0, 0.2]])
    logits = torch.tensor([[2.0, 0.0, 1.0, 0.5, -1.0]], requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        choice_loss(logits, gains, 2).sum().backward()
        optimizer.step()
    assert choose(logits.detach(), 2).tolist() == [[0, 1, 0, 1, 0]]
