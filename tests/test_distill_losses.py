"""What light training compares: a router is taught the same by wide products as by the experts' outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import sparsify
from sparsify.distill_losses import layer_losses
from sparsify.models.bert import Bert, BertConfig
from sparsify.passes.calibrate import as_call, flat_inputs
from sparsify.passes.capture import capture
from sparsify.passes.normalize_linear import NormalizeLinearPass
from sparsify.passes.training_graph import TracingInterpreter, routed_ffns


class _Padded(nn.Module):
    """A mask makes padding of tokens that the encoder sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Bert(BertConfig())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids) * attention_mask.unsqueeze(2)


@pytest.mark.parametrize("widths", [None, (64, 64, 32, 32, 64)])
def test_both_ways_teach_a_router_the_same(widths: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: padding teaches nothing, and errors meet the tokens that they are of; also where widths differ."""
    monkeypatch.setattr("sparsify.distill_losses._TAUGHT_SHARE", 1)
    monkeypatch.setattr("sparsify.distill_losses._ROUTED_TOKENS", 10**6)
    dense = _Padded().eval()
    batch = {"input_ids": torch.randint(0, 256, (4, 9)), "attention_mask": torch.ones(4, 9).tril(3).long()}
    more: dict[str, Any] = {"num_experts": len(widths or range(4)), "expert_widths": widths}
    sparse = sparsify(dense, (), batch, top_k=2, num_shared_experts=0, select="all", **more)
    reference = NormalizeLinearPass()(capture(dense, (), batch)).graph_module
    call, ffns = as_call(batch), routed_ffns(sparse, reference)
    kept = [ffn.hidden.name for ffn in ffns]
    flat = flat_inputs(reference, call, 0)
    teacher = TracingInterpreter(reference, kept)
    teacher.run(*flat, enable_io_processing=False)
    found: list[list[Tensor]] = []
    for masks in (False, True):
        inputs = [ffn.router_call.all_input_nodes[0].name for ffn in ffns]
        student = TracingInterpreter(sparse, [*kept, *inputs], teaches=masks)
        student.run(*flat, enable_io_processing=False)
        assert bool(student.taught) == masks
        found.append(
            [part for f in ffns for part in layer_losses(sparse, f, student, teacher.kept[f.hidden.name], call)]
        )
    assert all(loss.detach() > 0 for loss in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)
