"""The calibration tokens of a layer: some are kept out of the fit, all are weighted, in memory or in files."""

from __future__ import annotations

import sys

import pytest
import torch

from sparsify.passes.on_disk import lies_in_file
from sparsify.passes.split.sample import Part, Sample, hold_out, join

PLACES = [False, True] if sys.platform == "linux" else [False]


def parts(tokens: int, *sizes: int) -> list[Part]:
    """Everything about token number i says so."""
    numbers = torch.arange(float(tokens)).unsqueeze(1)
    return [Part(x, -x, torch.ones(len(x)), x[:, 0].long()) for x in numbers.split(list(sizes))]


@pytest.mark.parametrize("on_disk", PLACES)
def test_held_out_tokens_are_not_fitted(on_disk: bool) -> None:
    """Protects: the reported error is honest, however tokens come in batches, of which some are empty."""
    fit, measured = hold_out(iter(parts(25, 12, 0, 1, 12)), on_disk=on_disk)
    assert measured.x.flatten().tolist() == [9, 19]
    assert fit.x.flatten().tolist() == [number for number in range(25) if number not in (9, 19)]
    assert lies_in_file(fit.x) == lies_in_file(measured.target) == on_disk
    for kept in (fit, measured):
        torch.testing.assert_close(kept.target, -kept.x)
        torch.testing.assert_close(kept.weight, torch.ones(len(kept.x)))
        assert kept.ids is not None
        assert kept.ids.tolist() == kept.x.flatten().tolist()


def test_few_tokens_serve_both() -> None:
    """Protects: an example input of a few tokens, which is all there is."""
    fit, measured = hold_out(parts(3, 2, 1))
    assert fit is measured
    assert fit.x.flatten().tolist() == [0, 1, 2]
    assert torch.equal(join(parts(3, 2, 1)).target, fit.target)


def test_weights() -> None:
    """Protects: one over the variance of the hidden state, at a mean of 1 over all tokens; silent ones are bounded."""
    variance = torch.rand(40) + 0.1
    variance[7] = 0.0
    fit, measured = hold_out([Part(torch.zeros(40, 1), torch.zeros(40, 1), variance)])
    held = torch.arange(40) % 10 == 9
    expected = 1 / torch.maximum(variance, 1e-4 * variance.mean())
    expected /= expected.mean()
    torch.testing.assert_close(fit.weight, expected[~held])
    torch.testing.assert_close(measured.weight, expected[held])
    torch.testing.assert_close(join([Part(torch.zeros(40, 1), torch.zeros(40, 1), variance)]).weight, expected)


@pytest.mark.parametrize("on_disk", PLACES)
def test_every_few_tokens(on_disk: bool) -> None:
    """Protects: what begins the training sees tokens of the whole text."""
    fit, _ = hold_out(parts(30, 30), on_disk=on_disk)
    few = fit.every(4)
    for taken, whole in ((few.x, fit.x), (few.target, fit.target), (few.weight, fit.weight), (few.ids, fit.ids)):
        assert taken is not None
        assert whole is not None
        assert torch.equal(taken, whole[::4])
    assert not lies_in_file(few.x)


def test_manageable_parts() -> None:
    """Protects: ids stay beside their tokens where both are read a part at a time."""
    x, ids = torch.randn(2500, 2), torch.arange(2500)
    sample = Sample(x, x, torch.ones(2500), ids)
    found = list(sample.parts())
    assert [len(own) for own, _ in found] == [1024, 1024, 452]
    assert torch.equal(torch.cat([own for _, own in found if own is not None]), ids)
    assert [own for _, own in Sample(x, x, torch.ones(2500)).parts()] == [None] * 3
