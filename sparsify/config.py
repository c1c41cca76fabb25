"""Options of a conversion: one frozen dataclass, validated where it is made."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, Union, cast

from sparsify.budget import Budget, read_budget
from sparsify.routers import LinearRouter, Reads, Router, UnitRouter, make_router

if TYPE_CHECKING:
    from sparsify.passes.match_ffn import FFNMatch

# A preset, one glob pattern, several of them, a number of FFNs, a fraction of them, or a predicate on FFNMatch.
Select = Union[str, "tuple[str, ...]", "list[str]", int, float, "Callable[[FFNMatch], bool]"]


@dataclass(frozen=True)
class LayerOptions:
    """What differs from the config in some FFNs. None leaves what the config says, or an earlier pattern.

    `num_experts` alone stands for equal parts, also where the config has `expert_widths`.
    """

    num_experts: int | None = None
    top_k: int | None = None
    num_shared_experts: int | None = None
    expert_widths: tuple[int, ...] | list[int] | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work in any config.

        Raises:
            ValueError: says what was given and what is allowed.
        """
        for name, least in (("num_experts", 1), ("top_k", 1), ("num_shared_experts", 0)):
            value: int | None = getattr(self, name)
            if value is not None:
                _at_least(name, value, least)
        if self.expert_widths is not None:
            object.__setattr__(self, "expert_widths", read_widths(self.expert_widths, self.num_experts))
            object.__setattr__(self, "num_experts", len(self.expert_widths))
        if self.num_experts is not None and self.top_k is not None:
            check_counts(self.num_experts, self.top_k, self.num_shared_experts)


_DEFAULT_EXPERTS = 16

# The input that is added to a model for what its routers read, unless `ids_input` names another one.
ADDED_INPUTS = {"labels": "expert_labels", "embedding": "expert_embedding"}

# Glob pattern on names -> fields of LayerOptions. A config keeps them as pairs with LayerOptions, to be hashable.
Overrides = Union["Mapping[str, Mapping[str, Any]]", "tuple[tuple[str, LayerOptions | Mapping[str, Any]], ...]"]


Start = Literal["split", "upcycle", "shared"]


@dataclass(frozen=True)
class SparsifyConfig:
    """How to make experts of an FFN.

    Attributes:
        start: "split" divides the neurons among the experts: less compute. "upcycle" gives every expert a copy of the
            FFN: more parameters to train, never faster (sparse upcycling, arXiv 2212.05055). "shared" keeps the whole
            FFN for every token beside experts whose output starts at zero.
        num_experts: equal parts that the neurons of an FFN are divided into, shared experts included; or its copies.
        top_k: experts that run for a token, shared experts included; of a split, `top_k / num_experts` is computed.
        num_shared_experts: parts that run for every token. As many as `top_k`: static pruning, no part is routed. None:
            see `shared`. Only for "split".
        expert_widths: neurons of each part, shared experts first, where they are not to be equal; `num_experts` follows
            from it. Their sum is that of the FFN's neurons; give FFNs of another size widths of their own in
            `overrides`. Routed experts are made of equal units, as large as the greatest common divisor of their widths
            allows: multiples of 32 run fast. Only for "split".
        router: a name of the catalogue (`sparsify routers`). None: "mlp" for "split", else "top-k".
        router_options: further arguments of the router's constructor.
        ids_input: the input of the model that a router reads beside the tokens: integers, or an embedding. None: token
            ids are those that the largest embedding reads, labels are the input "expert_labels", embeddings
            "expert_embedding". A keyword input that the model does not have is added to the `SparseModel`: give its
            example with the others.
        exact_start: divide routing weights by their own value (by their sum for copies), without a gradient through
            the divisor. A router whose weights do not sum to 1 then starts as the dense model, and learns from there.
        granularity: cut every copy into this many shards, each an expert of its own, `num_experts` in all (granular
            upcycling, arXiv 2410.07524). Only for "upcycle" and "shared".
        allow_non_causal: convert a causal model even where the router chooses by looking at later tokens. Training and
            scores of whole sequences then see the future, and generation, which does not, gives something else.
        reinitialise: share of the neurons of every copy that is drawn anew, so that copies come apart in training
            (Drop-Upcycling, arXiv 2502.19261, uses 0.5). Only for "upcycle"; the start is not exact then.
        budget: what the FFNs that `select` takes may cost, or the model may lose. `top_k` and `num_shared_experts` of
            each are then chosen by measured error, pruning and leaving it dense among the choices; needs calibration
            data. None: `top_k` everywhere. Only for "split".
            A number between 0 and 1, or "50%": share of their multiply-adds for a token that remains, routers included.
            "12ms": milliseconds of their calls together, with as many tokens each as `target_tokens` says, on the
            device of the model: measured for some choices, by the cost model between them, measured again for what was
            chosen. All else that the model computes comes on top.
            "error<=0.1": the fewest multiply-adds with which the outputs differ by no more than that from those of the
            dense model, as relative L2 difference |converted - dense| / |dense| over all floating outputs of every
            tenth calibration batch (at least one), which is kept out of the fit. Takes several conversions.
        select: which FFNs to convert. "auto": those that map the hidden size to itself and are wide enough to pay;
            "all": every legal one; glob patterns on names, each of which must match; a predicate on `FFNMatch`.
            The others choose among what "auto" takes, n FFNs in graph order:
            an int N: the last N; a float in (0, 1]: that fraction of the n, rounded up, counted from the end;
            "every-other": the 2nd, 4th, ..., so the last one only where n is even (GShard, GLaM);
            "every-fourth": the 4th, 8th, ... (ST-MoE); "last-half": 0.5;
            "later": sparse at first, all at the end: the 4th, 8th, ... of the first half and the whole last half.
            Late layers gain most from experts (DeepSpeed-MoE, arXiv 2201.05596, which compares the halves).
        overrides: FFNs with numbers of their own: glob patterns on names to `num_experts`, `top_k`,
            `num_shared_experts` and `expert_widths`, as in `{"*.11.*": {"top_k": 8}}`. Where several match, the later
            one wins.
        target_tokens: tokens of a call, such as `(1, 512)`. The presets then leave an FFN dense whose experts are not
            faster at each of these sizes, as measured on the device of the model; `select="all"`, names and predicates
            convert it all the same. With `budget`, each number of parts is judged so. The report holds prediction and
            measurement. Empty measures nothing, so that the same model gives the same result on every machine.
        router_hidden_size: width of the router's hidden layer.
        refit: fit the experts to the routing (needs calibration): `distill_steps`, then down_proj in closed form.
            Without it `set_top_k(num_experts)` gives the dense model back.
        distill_steps: steps in which experts and router of an FFN, or what pruning left, are trained towards the hidden
            state of the dense model, on the calibration tokens; fewer where those are few, and none where held-out
            tokens say that it does not help. 0 leaves the closed form alone.
        ridge: strength of the pull to the old weights in the refit, relative to the mean square of a neuron.
        max_calibration_tokens: no more calibration batches are read once this many tokens were seen. Where they take
            more memory than the model, they lie in temporary files (Linux; in `TMPDIR`).
        seed: of the clustering and the training of the routers.
    """

    num_experts: int = _DEFAULT_EXPERTS
    top_k: int = 4
    num_shared_experts: int | None = None
    expert_widths: tuple[int, ...] | list[int] | None = None
    start: Start = "split"
    router: str | None = None
    router_options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    ids_input: str | None = None
    exact_start: bool = False
    allow_non_causal: bool = False
    granularity: int = 1
    reinitialise: float = 0.0
    budget: float | str | None = None
    select: Select = "auto"
    overrides: Overrides = ()
    target_tokens: tuple[int, ...] | list[int] | int = ()
    router_hidden_size: int = 64
    refit: bool = True
    distill_steps: int = 300
    ridge: float = 0.1
    max_calibration_tokens: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot work, and freeze what a caller could still change.

        Raises:
            ValueError: says what was given and what is allowed.
        """
        if self.expert_widths is not None:
            counted = None if self.num_experts == _DEFAULT_EXPERTS else self.num_experts
            object.__setattr__(self, "expert_widths", read_widths(self.expert_widths, counted))
            object.__setattr__(self, "num_experts", len(self.expert_widths))
        check_counts(self.num_experts, self.top_k, self.num_shared_experts)
        object.__setattr__(self, "router_options", tuple(sorted(dict(self.router_options).items())))
        self._check_start()
        object.__setattr__(self, "target_tokens", _read_tokens(self.target_tokens))
        self._check_budget()
        _check_select(self.select)
        if isinstance(self.select, list):
            object.__setattr__(self, "select", tuple(self.select))
        object.__setattr__(self, "overrides", _freeze_overrides(self.overrides))
        _at_least("router_hidden_size", self.router_hidden_size, 1)
        _at_least("distill_steps", self.distill_steps, 0)
        _at_least("max_calibration_tokens", self.max_calibration_tokens, 1)
        if not self.ridge > 0:
            raise ValueError(f"ridge must be above 0, got {self.ridge}")
        router = self._example_router()
        if router is not None:
            self._check_router(router)

    @property
    def shared(self) -> int:
        """`num_shared_experts` with None resolved: none where nothing can be routed beside them, else at least one.

        Of equal parts behind the router "mlp" it is the share of K that K is of E, rounded up: the more runs, the more
        of it should always run (docs/quality.md).
        """
        if self.num_shared_experts is not None:
            return self.num_shared_experts
        if self.start != "split" or not 1 < self.top_k < self.num_experts:
            return 0
        grows = self.router_name == "mlp" and self.expert_widths is None
        return min(self.top_k - 1, -(-self.top_k**2 // self.num_experts)) if grows else 1

    @property
    def router_name(self) -> str:
        """`router` with None resolved."""
        return self.router or ("mlp" if self.start == "split" else "top-k")

    @property
    def limit(self) -> Budget | None:
        """`budget`, read."""
        return None if self.budget is None else read_budget(self.budget)

    @property
    def reads(self) -> Reads | None:
        """What the router reads beside the tokens."""
        router = self._example_router()
        return None if router is None else router.reads

    @property
    def ids_name(self) -> str | None:
        """`ids_input` with None resolved for labels and embeddings."""
        return self.ids_input or ADDED_INPUTS.get(self.reads or "")

    @property
    def options(self) -> dict[str, Any]:
        """`router_options` as a dict, with what other fields say of the router."""
        own = dict(cast("tuple[tuple[str, Any], ...]", self.router_options))
        return {"router_hidden_size": self.router_hidden_size, **own} if self.router_name == "mlp" else own

    @property
    def tokens(self) -> tuple[int, ...]:
        """`target_tokens` as a tuple."""
        return cast("tuple[int, ...]", self.target_tokens)

    @property
    def layer_options(self) -> tuple[tuple[str, LayerOptions], ...]:
        """`overrides` as pairs of pattern and options, in their order."""
        return cast("tuple[tuple[str, LayerOptions], ...]", self.overrides)

    def widths_of(self, neurons: int) -> tuple[int, ...]:
        """Places for neurons in every expert of a split FFN with so many, shared experts first.

        Equal parts may have some places too many; explicit widths may not fit `neurons`.
        """
        return tuple(self.expert_widths or [-(-neurons // self.num_experts)] * self.num_experts)

    def _example_router(self) -> Router | None:
        """A small one; None where nothing is routed."""
        routed = (self.num_experts - self.shared, self.top_k - self.shared)
        return make_router(self.router_name, 8, *routed, self.options, seed=0) if routed[1] else None

    def _check_start(self) -> None:
        if self.start not in ("split", "upcycle", "shared"):
            raise ValueError(f"start must be 'split', 'upcycle' or 'shared', got {self.start!r}")
        _at_least("granularity", self.granularity, 1)
        if not 0 <= self.reinitialise < 1:
            raise ValueError(f"reinitialise is a share of the neurons, from 0 to below 1, got {self.reinitialise}")
        if self.start != "split" and self.num_shared_experts:
            raise ValueError(
                f"num_shared_experts={self.num_shared_experts} takes parts of a split; with start={self.start!r} give "
                "0, or start='shared' to keep the whole FFN for every token"
            )
        if self.start != "split" and self.expert_widths is not None:
            raise ValueError(
                f"expert_widths={list(self.expert_widths)} divides the neurons of an FFN; start={self.start!r} copies "
                "all of them, or equal shards of them (granularity=), so leave it out"
            )
        if self.budget is not None and self.expert_widths is not None:
            raise ValueError("budget= chooses among equal parts; leave expert_widths out, or choose top_k yourself")
        if self.start == "split" and self.granularity > 1:
            raise ValueError("granularity cuts copies; with start='split' raise num_experts instead")
        if self.start != "upcycle" and self.reinitialise:
            raise ValueError(f"reinitialise sets copies apart; start={self.start!r} has none, so leave it at 0")
        for name in ("num_experts", "top_k"):
            if getattr(self, name) % self.granularity:
                raise ValueError(
                    f"{name} must be a multiple of granularity ({self.granularity}), so that whole copies run, got "
                    f"{getattr(self, name)}"
                )

    def _check_budget(self) -> None:
        if self.limit is None:
            return
        if (self.start, self.router_name) != ("split", "mlp"):
            raise ValueError(
                f"budget= chooses parts of a split behind the router 'mlp', not start={self.start!r} with "
                f"router={self.router_name!r}; leave it out"
            )
        if self.num_experts < 2:
            raise ValueError(
                f"budget= chooses how many parts run, so num_experts must be at least 2, got {self.num_experts}"
            )
        if self.limit.unit == "ms" and len(self.tokens) != 1:
            raise ValueError(
                f"budget={self.budget!r} is the time of one call, so say of how many tokens with one number, such as "
                f"target_tokens=512; got {self.tokens}"
            )

    def _check_router(self, router: Router) -> None:
        if router.merges and len(set((self.expert_widths or ())[self.shared :])) > 1:
            raise ValueError(
                f"router={self.router_name!r} adds up the weights of experts, so they need one width, not "
                f"expert_widths={list(self.expert_widths or ())}; choose another router, or give num_experts"
            )
        if router.merges and self.start == "split":
            raise ValueError(
                f"router={self.router_name!r} averages the weights of its experts, which only copies of the whole FFN "
                "allow; use start='upcycle'"
            )
        if self.start != "split" and isinstance(router, UnitRouter):
            raise ValueError(
                f"router={self.router_name!r} passes no gradient on, so it cannot learn to choose among copies; choose "
                "another one (`sparsify routers`), or start='split'"
            )
        if self.ids_input is not None and router.reads is None:
            raise ValueError(
                f"ids_input={self.ids_input!r} is for routers that read ids, labels or an embedding; "
                f"{self.router_name!r} with these router_options reads none"
            )
        if self.granularity > 1 and not isinstance(router, LinearRouter):
            raise ValueError(
                f"granularity needs a router of linear logits, which can choose the shards of a copy together at "
                f"first; {self.router_name!r} is none"
            )

    def for_layer(self, name: str) -> SparsifyConfig:
        """The config of one FFN: its overrides applied, none left.

        Raises:
            ValueError: the numbers do not fit together.
        """
        changes: dict[str, Any] = {}
        for pattern, options in self.layer_options:
            if fnmatch.fnmatchcase(name, pattern):
                changes |= _with_the_other({k: value for k, value in vars(options).items() if value is not None})
        return replace(self, overrides=(), **changes)

    def with_options(self, **options: Any) -> SparsifyConfig:
        """The config with other values of some fields; of `num_experts` and `expert_widths`, the one given counts.

        Raises:
            ValueError: says what was given and what is allowed.
        """
        return replace(self, **_with_the_other(options))


def _with_the_other(options: dict[str, Any]) -> dict[str, Any]:
    """`num_experts` follows from `expert_widths`; alone, it means equal parts."""
    if options.get("expert_widths") is not None:
        return {"num_experts": _DEFAULT_EXPERTS, **options}
    return {"expert_widths": None, **options} if "num_experts" in options else options


def _read_tokens(given: object) -> tuple[int, ...]:
    tokens: tuple[Any, ...] = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    for number in tokens:
        _at_least("target_tokens", number, 1)
    return tokens


def check_counts(num_experts: int, top_k: int, num_shared_experts: int | None) -> None:
    """Refuse numbers of experts that do not fit together.

    Raises:
        ValueError: says what was given and what is allowed.
    """
    _at_least("num_experts", num_experts, 1)
    _whole("top_k", top_k)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be between 1 and num_experts ({num_experts}), got {top_k}")
    if num_shared_experts is None:
        return
    _whole("num_shared_experts", num_shared_experts)
    if not 0 <= num_shared_experts <= top_k:
        raise ValueError(
            f"num_shared_experts must be between 0 and top_k ({top_k}), as the shared experts are among the top_k that "
            f"run for a token, got {num_shared_experts}"
        )


def read_widths(given: object, num_experts: int | None) -> tuple[int, ...]:
    """Widths of experts as a tuple.

    Args:
        given: `expert_widths` as a user wrote it.
        num_experts: as a user wrote it beside them; None where it is theirs to say.

    Raises:
        ValueError: says what was given and what is allowed.
    """
    if not isinstance(given, (tuple, list)) or not given:
        raise ValueError(f"expert_widths must list the neurons of every expert, as in [768, 384, 384], got {given!r}")
    widths = tuple(cast("Sequence[int]", given))
    for width in widths:
        _at_least("every one of expert_widths", width, 1)
    if num_experts not in (None, len(widths)):
        raise ValueError(
            f"expert_widths={list(widths)} are {len(widths)} experts, but num_experts={num_experts}; leave num_experts "
            "out, as it follows from the widths"
        )
    return widths


def _at_least(name: str, value: int, least: int) -> None:
    _whole(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")


def _check_select(select: object) -> None:
    if isinstance(select, str) or callable(select):
        return
    if isinstance(select, (tuple, list)) and select and all(isinstance(pattern, str) for pattern in select):
        return
    if isinstance(select, bool) or not isinstance(select, (int, float)):
        raise ValueError(
            "select must be a preset, a glob pattern, a tuple of patterns, a number of FFNs, a fraction of them or a "
            f"predicate on FFNMatch, got {select!r}"
        )
    if isinstance(select, int) and select < 1:
        raise ValueError(f"select as a number of FFNs must be at least 1, got {select}")
    if isinstance(select, float) and not 0 < select <= 1:
        raise ValueError(f"select as a fraction of the FFNs must be above 0 and at most 1, got {select}")


def _freeze_overrides(overrides: object) -> tuple[tuple[str, LayerOptions], ...]:
    pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
    if not isinstance(pairs, Iterable) or isinstance(pairs, str):
        raise ValueError(f"overrides must map glob patterns on names to numbers of experts, got {overrides!r}")
    return tuple((str(pattern), _read_options(pattern, given)) for pattern, given in cast("Iterable[Any]", pairs))


def _read_options(pattern: object, given: object) -> LayerOptions:
    if isinstance(given, LayerOptions):
        return given
    allowed = ", ".join(field.name for field in fields(LayerOptions))
    if not isinstance(given, Mapping) or set(given) - {field.name for field in fields(LayerOptions)}:
        raise ValueError(f"overrides[{pattern!r}] must give numbers for some of {allowed}, got {given!r}")
    try:
        return LayerOptions(**given)
    except ValueError as error:
        raise ValueError(f"overrides[{pattern!r}]: {error}") from error
