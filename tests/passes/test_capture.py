"""`capture`: what comes out computes what the model computes, at every size, and the model stays as it was."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.errors import CaptureError
from sparsify.models.bert import Bert, BertConfig
from sparsify.passes.capture import capture, left_out
from sparsify.passes.fixed_dims import fixed_dims


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Batch:
    x: Tensor
    mask: Tensor | None = None


@dataclass
class Unregistered:
    x: Tensor


torch.export.register_dataclass(Batch, serialized_type_name="tests.test_capture.Batch")


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


class Nested(Linear):
    def forward(self, inputs: dict[str, Any]) -> Any:
        return self.linear(inputs["a"][0]) + inputs["b"]["c"], [inputs["a"][1] * 2, {"none": None}]


class KeywordOnly(Linear):
    def forward(self, *, x: Tensor, shift: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.linear(x) + shift if mask is None else self.linear(x) * mask


class VarPositional(Linear):
    def forward(self, x: Tensor, *others: Tensor, scale: Tensor) -> Tensor:
        return self.linear(x + others[0] - others[1]) * scale


class VarKeyword(Linear):
    def forward(self, x: Tensor, y: Tensor | None = None, **others: Any) -> Tensor:
        return self.linear(x) * others["scale"] + others["nested"]["shift"] + (0 if y is None else y)


class PassesOn(Linear):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(*args, **kwargs)

    def _forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.linear(x) + shift


class NoTensors(Linear):
    def forward(self, x: Tensor, count: int, scale: float, is_square: bool, mode: str, none: None = None) -> Tensor:
        x = self.linear(x)[:count]
        x = x * x if is_square else x
        return x * scale if mode == "scale" and none is None else x


class ListOfTensors(Linear):
    def forward(self, tensors: list[Tensor]) -> Tensor:
        return self.linear(torch.cat(tensors))


class OfDataclass(Linear):
    def forward(self, batch: Batch) -> Batch:
        return Batch(self.linear(batch.x) * batch.mask)


class OfNamedTuple(Linear):
    def forward(self, pair: Pair) -> OrderedDict[str, Tensor]:
        return OrderedDict(b=self.linear(pair.first), a=pair.second + 1)


def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(Linear):
    @decorated
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.linear(x) + shift


def partial_forward() -> nn.Module:
    model: Any = Linear()
    model.forward = functools.partial(KeywordOnly.forward, model, mask=None)
    return model


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape)


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "nested": (Nested, lambda n: (({"a": [numbers(n, 4), numbers(5)], "b": {"c": numbers(n, 4)}},), {})),
    "keyword-only": (KeywordOnly, lambda n: ((), {"x": numbers(n, 4), "shift": numbers(n, 4)})),
    "optional": (KeywordOnly, lambda n: ((), {"mask": None, "x": numbers(n, 4), "shift": numbers(n, 4)})),
    "*args": (VarPositional, lambda n: ((numbers(n, 4), numbers(n, 4), numbers(n, 4)), {"scale": numbers(n, 1)})),
    "**kwargs": (VarKeyword, lambda n: ((numbers(n, 4),), {"nested": {"shift": numbers(n, 4)}, "scale": numbers(4)})),
    "**kwargs before": (
        VarKeyword,
        lambda n: ((), {"scale": numbers(4), "y": numbers(n, 4), "nested": {"shift": numbers(4)}, "x": numbers(n, 4)}),
    ),
    "passed on": (PassesOn, lambda n: ((numbers(n, 4),), {"shift": numbers(n, 4)})),
    "no tensors": (NoTensors, lambda n: ((numbers(n, 4), 2, 0.5), {"mode": "scale", "is_square": True, "none": None})),
    "list of tensors": (ListOfTensors, lambda n: (([numbers(n, 4), numbers(2, 4)],), {})),
    "dataclass": (OfDataclass, lambda n: ((Batch(numbers(n, 4), numbers(n, 1)),), {})),
    "named tuple": (OfNamedTuple, lambda n: ((Pair(numbers(n, 4), numbers(n)),), {})),
    "decorated": (Decorated, lambda n: ((numbers(n, 4),), {"shift": numbers(n, 4)})),
    "partial": (partial_forward, lambda n: ((), {"shift": numbers(n, 4), "x": numbers(n, 4)})),
}


def assert_same(graph_module: nn.Module, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    want, want_spec = pytree.tree_flatten(model(*args, **kwargs))
    got, got_spec = pytree.tree_flatten(graph_module(*args, **kwargs))
    assert got_spec == want_spec
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("build", "inputs"), CALLS.values(), ids=CALLS)
def test_every_way_to_call_a_model(build: Callable[[], nn.Module], inputs: Callable[[int], Any]) -> None:
    """Protects: any structure of inputs and outputs is kept, another size and another order of keywords included."""
    model = build().eval()
    graph_module = capture(model, *inputs(3))
    for rows in (3, 7):
        args, kwargs = inputs(rows)
        assert_same(graph_module, model, args, kwargs)
        assert_same(graph_module, model, args, dict(reversed(kwargs.items())))


def test_sizes_stay_dynamic() -> None:
    """Protects: a graph captured at [2, 5] serves other batches and lengths."""
    model = Bert(BertConfig()).eval()
    graph_module = capture(model, (torch.randint(0, 256, (2, 5)),))
    for shape in ((1, 1), (3, 11)):
        input_ids = torch.randint(0, 256, shape)
        torch.testing.assert_close(graph_module(input_ids), model(input_ids))


def test_sizes_of_0_and_1(caplog: pytest.LogCaptureFixture) -> None:
    """Protects: they are traced as they are, without a warning of torch about each of them."""

    class Model(Linear):
        def forward(self, x: Tensor, empty: Tensor, number: Tensor) -> Tensor:
            return self.linear(x) + empty.sum() * number

    model = Model().eval()
    graph_module = capture(model, (numbers(1, 4), numbers(0, 3), torch.tensor(2.0)))
    assert_same(graph_module, model, (numbers(1, 4), numbers(0, 5), torch.tensor(3.0)), {})
    assert "specialized" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Protects: weights and outputs keep their type."""
    model = Bert(BertConfig()).to(dtype).eval()
    input_ids = torch.randint(0, 256, (2, 5))
    graph_module = capture(model, (input_ids,))
    assert {parameter.dtype for parameter in graph_module.parameters()} == {dtype}
    assert torch.equal(graph_module(input_ids), model(input_ids))


class AsksForValues(nn.Module):
    """Looks at its input, but not while it is traced, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and x.sum().item() > 1e9:
            return x
        return self.linear(x)


def test_meta_device_is_not_asked_for_values() -> None:
    """Protects: a model without weights can be planned, whatever it looks at when it is run."""
    graph_module = capture(AsksForValues().to("meta"), (torch.empty(2, 3, device="meta"),))
    assert graph_module(torch.empty(5, 3, device="meta")).shape == (5, 3)


def test_meta_device() -> None:
    """Protects: a model without memory can be looked at."""
    model = Bert(BertConfig()).to("meta").eval()
    graph_module = capture(model, (torch.randint(0, 256, (2, 5), device="meta"),))
    assert graph_module(torch.randint(0, 256, (3, 7), device="meta")).shape == (3, 7, 64)


def small_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50)
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("is_tuple", [False, True])
def test_encoder_outputs_as_input(is_tuple: bool) -> None:
    """Protects: an encoder-decoder that is given the `ModelOutput` or tuple of its encoder, and returns one."""
    from transformers.modeling_outputs import BaseModelOutput

    def inputs(batch: int, length: int) -> dict[str, Any]:
        hidden, ids = numbers(batch, length, 16), torch.randint(1, 50, (batch, 3))
        encoded = (hidden,) if is_tuple else BaseModelOutput(last_hidden_state=hidden)  # pyright: ignore[reportArgumentType]
        return {"encoder_outputs": encoded, "decoder_input_ids": ids, "use_cache": False}

    model = small_t5()
    graph_module = capture(model, (), inputs(2, 6))
    assert_same(graph_module, model, (), inputs(3, 9))


def test_a_cache_in_the_output_is_left_out() -> None:
    """Protects: a language model as it comes, which returns a cache, can be traced; what is missing has a name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    model = LlamaForCausalLM(config).eval()
    graph_module = capture(model, (), {"input_ids": torch.randint(0, 50, (2, 6))})
    assert [text.partition(" ")[2] for text in left_out(graph_module)] == ["(DynamicCache)"]
    assert "forward" not in vars(model)
    input_ids = torch.randint(0, 50, (3, 4))
    output = graph_module(input_ids=input_ids)
    torch.testing.assert_close(output.logits, model(input_ids).logits)
    assert list(output) == ["logits"]


def test_a_model_with_a_forward_of_its_own_keeps_it() -> None:
    """Protects: an instance with its own `forward` has the same one afterwards."""
    model = partial_forward()
    before = model.forward
    capture(model, (), {"x": numbers(2, 4), "shift": numbers(2, 4)})
    assert vars(model)["forward"] is before


def test_sizes_that_python_needs_as_numbers() -> None:
    """Protects: where tracing fails because a size is free, it is fixed, the batch stays free, and both are said."""

    class Model(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + {6: 1.0, 7: 2.0}[x.shape[1]]

    model = Model().eval()
    graph_module = capture(model, (numbers(2, 6, 4),))
    assert_same(graph_module, model, (numbers(5, 6, 4),), {})
    notes = [str(fixed) for fixed in fixed_dims(graph_module)]
    assert notes[0].startswith("input `x` has a fixed size of 6 in dimension 1: tracing with every size free failed at")
    assert "`return self.linear(x) + {6: 1.0, 7: 2.0}[x.shape[1]]` (test_capture.py:" in notes[0]
    assert [fixed.dim for fixed in fixed_dims(graph_module)] == [1, 2]


def test_dynamic_shapes_can_be_given() -> None:
    """Protects: what the caller says about shapes goes to torch as it is."""
    graph_module = capture(nn.Linear(4, 4), (numbers(2, 3, 4),), None, ({0: torch.export.Dim.AUTO},))
    sizes = graph_module.graph.find_nodes(op="placeholder")[0].meta["val"].shape
    assert [isinstance(size, torch.SymInt) for size in sizes] == [True, False, False]


def test_leaves_the_model_as_it_was() -> None:
    """Protects: training flags, which may differ by module, come back; weights are shared; dropout is not traced."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    model[0].eval()
    graph_module = capture(model, (torch.randn(2, 4),))
    assert [module.training for module in model] == [False, True, True]
    assert graph_module.get_parameter("0.weight") is model.get_parameter("0.weight")
    assert "forward" not in vars(model)
    x = torch.randn(3, 4)
    model.eval()
    torch.testing.assert_close(graph_module(x), model(x))


def test_leaves_the_inputs_as_they_were() -> None:
    """Protects: a model that writes to its inputs does so when it is called, not while it is captured."""

    class Model(Linear):
        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return self.linear(inputs["x"].add_(1))

    inputs = {"x": numbers(2, 4)}
    before = copy.deepcopy(inputs)
    capture(Model(), (inputs,))
    assert torch.equal(inputs["x"], before["x"])


def test_inputs_that_do_not_fit() -> None:
    """Protects: the message shows what was given and the model's own error."""
    with pytest.raises(CaptureError, match=r"(?s)do not fit Linear: called with \(float32\[2, 3\]\).*RuntimeError"):
        capture(nn.Linear(4, 4), (torch.randn(2, 3),))


def test_a_model_that_cannot_be_traced(capfd: pytest.CaptureFixture[str]) -> None:
    """Protects: the message names the file, line and text of the model; torch does not print its whole graph too."""

    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # the line to name
                return x
            return -x

    with pytest.raises(CaptureError, match=r"Branches cannot be traced: .*test_capture\.py:\d+, `if x\.sum\(\) > 0"):
        capture(Branches(), (torch.ones(2, 3),))
    assert "def forward" not in capfd.readouterr().err


def test_an_input_that_torch_does_not_know() -> None:
    """Protects: the message names the input, its class and the way out."""

    class Model(nn.Module):
        def forward(self, x: Tensor, **options: Any) -> Tensor:
            return x * options["batches"][0].x

    message = r"its input `batches\[0\]` is a Unregistered, .*torch\.export\.register_dataclass"
    with pytest.raises(CaptureError, match=message):
        capture(Model(), (numbers(2, 3),), {"batches": [Unregistered(numbers(2, 3))]})


@pytest.mark.parametrize("wrap", [Unregistered, lambda x: (x, Unregistered(x)), lambda x: {1, 2}])
def test_an_output_that_torch_does_not_know(wrap: Callable[[Tensor], Any]) -> None:
    """Protects: tensors of a class that was not registered are not dropped in silence."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return wrap(x * 2)

    with pytest.raises(CaptureError, match=r"Model returns a (Unregistered|set), .*torch\.export\.register_dataclass"):
        capture(Model(), (numbers(2, 3),))
