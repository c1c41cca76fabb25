"""What a conversion did and what it costs, as plain data. `report_text.py` and `report_html.py` draw it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sparsify.passes.layer_times import LayerTime


@dataclass(frozen=True)
class FFNReport:
    """One FFN of the model.

    Attributes:
        name: of the FFN.
        kind: "plain", "gated", or "" where it was rejected before that was known.
        activation: its function of one neuron.
        hidden_size: D.
        intermediate_size: F.
        action: "converted", "dense" (legal, but left alone) or "rejected" (cannot be split).
        reason: why.
        num_experts: shared experts included; 0 if not converted.
        top_k: experts that run for a token, shared ones included.
        num_shared_experts: experts that run for every token.
        expert_widths: neurons of each expert, shared ones first; empty where they are equal parts or copies.
        receipt: max |split - dense| / max |dense| with all experts on, before the refit, in fp32.
        error: relative L2 error of the output on calibration tokens that were held out of every fit, by their weights
            (`passes/convert.py`); it decides whether training is kept.
        error_before_refit: the same before refit and training; None where nothing was refitted.
        tokens_per_expert: calibration tokens that each routed expert got.
        flops_before: of its linear layers, per token, 2 per multiply-add.
        flops_after: the same after conversion, router included; the mean over calibration tokens where it differs
            between them.
        parameters_before: weights and biases.
        parameters_after: the same after conversion, router included.
        times: of one call, dense and as experts, predicted and measured, at each of `target_tokens`.
    """

    name: str
    kind: str
    activation: str
    hidden_size: int
    intermediate_size: int
    action: Literal["converted", "dense", "rejected"]
    reason: str
    num_experts: int = 0
    top_k: int = 0
    num_shared_experts: int = 0
    expert_widths: tuple[int, ...] = ()
    receipt: float | None = None
    error: float | None = None
    error_before_refit: float | None = None
    tokens_per_expert: tuple[int, ...] = ()
    flops_before: int = 0
    flops_after: int = 0
    parameters_before: int = 0
    parameters_after: int = 0
    times: tuple[LayerTime, ...] = ()


@dataclass(frozen=True)
class MetricReport:
    """A task metric of the whole model: before is dense, after is converted."""

    name: str
    higher_is_better: bool
    before: float
    after: float


@dataclass(frozen=True)
class Report:
    """The whole model.

    Attributes:
        ffns: every FFN, in graph order, rejected ones included.
        notes: what the reader must know: inputs with fixed dimensions, a conversion without calibration, ...
        calibration_tokens: tokens that the statistics rest on; 0 without calibration.
        parameters_before: of the whole model, shared tensors counted once.
        parameters_after: the same after conversion.
        output_error: relative L2 difference of the outputs to the dense model on the example inputs, padding left out.
        seconds: wall-clock time of each stage.
        metric: a task metric, where the caller measured one.
    """

    ffns: tuple[FFNReport, ...]
    notes: tuple[str, ...]
    calibration_tokens: int
    parameters_before: int
    parameters_after: int
    output_error: float
    seconds: Mapping[str, float]
    metric: MetricReport | None = None

    @property
    def converted(self) -> tuple[FFNReport, ...]:
        """The FFNs that now are experts."""
        return tuple(ffn for ffn in self.ffns if ffn.action == "converted")

    @property
    def max_receipt(self) -> float:
        """The worst receipt; 0 if nothing was converted."""
        return max((ffn.receipt or 0.0 for ffn in self.converted), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, for `json.dump`."""
        return asdict(self)

    def __str__(self) -> str:
        """The table that `report_text.render` draws, 120 columns wide."""
        from sparsify.report_text import render

        return render(self, width=120)
