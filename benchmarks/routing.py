"""Every system of the catalogue from the same dense checkpoint, trained for the same steps; beside it the dense model.

    python benchmarks/routing.py                        everything, less than an hour on 2 quiet cores
    python benchmarks/routing.py --systems switch,hash --tasks gpt
    python benchmarks/routing.py --part 1/2             every second run; another process takes --part 2/2
    python benchmarks/routing.py --table-only           the tables of the runs that are there

Two dense models, made here: a GPT of 2 layers on the bytes of Shakespeare's plays and of reference prose (held-out
loss, in nats), and a ViT of 2 layers on the 8 x 8 digits of scikit-learn (held-out accuracy, in %). Each run converts
the checkpoint, trains it on `loss + aux_loss()` and measures. Seeds 0, 1, 2 choose the batches and the routers; the
spread is the largest minus the smallest of the three. Runs are kept in out/routing/, so that one that is broken off is
resumed; a run with other settings is made anew.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from sparsify import SparseModel, sparsify
from sparsify.bench import describe_machine, read_machine
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.models.text import Corpus, corpus
from sparsify.models.vit import ViT, ViTConfig
from sparsify.routers import ROUTERS, UnitRouter, make_router
from sparsify.routing_stats import record_routing

SEEDS = (0, 1, 2)
DENSE = "dense, continued"
EXPERTS = 8
_RECORDED = 20  # last steps of training whose routes are counted

# Experts where 8 do not fit: product keys need a square, an expert for each label of the text, all experts run.
COUNTS = {"peer": 9, "demix": 2, "mmoe": 4, "fixed": 4, "mixture-of-depths": 1}


@dataclass(frozen=True)
class Batch:
    """Inputs `[B, ...]`, targets, and a label of each for systems that route by label (None where there is none)."""

    inputs: Tensor
    targets: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Task:
    """A dense model and its data.

    `train` draws a batch; `quality` is a mean over `held_out`, which batches of one call each make up.
    """

    name: str
    measure: str
    higher_is_better: bool
    build: Callable[[], nn.Module]
    dense_steps: int
    steps: int
    train: Callable[[torch.Generator], Batch]
    held_out: Sequence[Batch]
    quality: Callable[[Tensor, Tensor], Tensor]
    has_ids: bool
    tokens: int  # of an input


def main(
    systems: Annotated[str, typer.Option(help="Names of the catalogue, with commas; all if empty.")] = "",
    tasks: Annotated[str, typer.Option(help="gpt, vit or both.")] = "gpt,vit",
    part: Annotated[str, typer.Option(help="i/n: every n-th run, from the i-th.")] = "1/1",
    table_only: Annotated[bool, typer.Option(help="Make no run.")] = False,
    output: Annotated[Path, typer.Option(help="Folder of the runs and tables.")] = Path("out/routing"),
) -> None:
    """Train what is missing, and write the tables."""
    torch.set_num_threads(1)  # seconds a step are those of one core
    known = [router.system.name for router in ROUTERS]
    unknown = set(systems.split(",")) - {*known, ""}
    if unknown:
        raise typer.BadParameter(f"no system is called {', '.join(sorted(unknown))}; `sparsify routers` lists them")
    names = [DENSE, *(systems.split(",") if systems else known)]
    chosen = [task() for name, task in TASKS.items() if name in tasks.split(",")]
    runs = [(task, name, seed) for seed in SEEDS for task in chosen for name in names]
    first, every = (int(number) for number in part.split("/"))
    failed: list[str] = []
    for task, name, seed in [] if table_only else runs[first - 1 :: every]:
        error = _try(task, name, seed, output)
        if error is not None:
            failed.append(error)
    tables = [_table(task, names, output) for task in chosen]
    machine = describe_machine(read_machine(with_onnxruntime=False))
    text = "\n".join([f"# Systems trained from one dense checkpoint\n\n{machine}, one thread a run\n", *tables])
    _write(output / "routing.md", text)
    runs_json = [json.loads(path.read_text()) for path in sorted(output.glob("runs/*.json"))]
    _write(output / "routing.json", json.dumps({"machine": machine, "runs": runs_json}, indent=1))
    print(text)
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


def gpt() -> Task:
    """Bytes of plays (label 0) and prose (label 1)."""
    texts = corpus()
    if not texts.plays:
        raise typer.BadParameter("the text of Shakespeare is missing; `make test` downloads it")
    kinds = [Corpus(texts.plays, (), ()), Corpus((), texts.prose, ())]
    length = 64

    def chunks(split: Any) -> list[Tensor]:
        joined = ["\n\n".join(kind.passages(400, characters=1000, split=split)).encode() for kind in kinds]
        found = [torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for text in joined]
        return [text[: len(text) // (length + 1) * (length + 1)].view(-1, length + 1) for text in found]

    train, held_out = chunks("calibration"), chunks("held_out")

    def batch(rows: Sequence[Tensor]) -> Batch:
        both = torch.cat(list(rows))
        labels = torch.cat([torch.full((len(part),), label) for label, part in enumerate(rows)])
        return Batch(both[:, :-1], both[:, 1:], labels)

    def draw(generator: torch.Generator) -> Batch:
        return batch([part[torch.randint(len(part), (8,), generator=generator)] for part in train])

    return Task(
        name="gpt",
        measure="held-out loss",
        higher_is_better=False,
        build=lambda: _small_embeddings(GPT(GPTConfig(max_positions=length))),
        dense_steps=1500,
        steps=200,
        train=draw,
        held_out=[batch([part[i : i + 32] for part in held_out]) for i in range(0, 128, 32)],
        quality=lambda logits, targets: nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten()),
        has_ids=True,
        tokens=length,
    )


def _small_embeddings(model: GPT) -> GPT:
    """The output projection is the embedding, whose rows of size 8 make the first predictions far too sure."""
    for table in (model.wte, model.wpe):
        table.weight.data *= 0.1
    return model


def vit() -> Task:
    """Digits; a quarter is held out. There are no token ids, and no labels but the answer."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16  # [1797, 1, 8, 8]
    answers = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, answers = images[order], answers[order]
    cut = len(images) // 4

    def draw(generator: torch.Generator) -> Batch:
        rows = cut + torch.randint(len(images) - cut, (64,), generator=generator)
        return Batch(images[rows], answers[rows], None)

    return Task(
        name="vit",
        measure="held-out accuracy, %",
        higher_is_better=True,
        build=lambda: ViT(ViTConfig(image_size=8, patch_size=2, num_channels=1)),
        dense_steps=400,
        steps=150,
        train=draw,
        held_out=[Batch(images[i : i + 64], answers[i : i + 64], None) for i in range(0, cut - 63, 64)],
        quality=lambda logits, targets: (logits.argmax(-1) == targets).float().mean() * 100,
        has_ids=False,
        tokens=17,
    )


TASKS: dict[str, Callable[[], Task]] = {"gpt": gpt, "vit": vit}


def settings(name: str, tokens: int) -> dict[str, Any]:
    """Options of the conversion: copies of the FFN where the system allows it, exact at the start where it can be.

    Soft MoE has as many slots as an input has tokens, so that it costs what the dense model does; Lory cuts an input
    into four segments or five.
    """
    router = next(router for router in ROUTERS if router.system.name == name)
    if issubclass(router, UnitRouter):
        return {"router": name, "start": "split", "num_experts": EXPERTS, "top_k": EXPERTS // 2}
    experts = COUNTS.get(name, EXPERTS)
    top_k = tokens // experts if name == "soft-moe" else router.default_top_k
    options = {"segment_size": tokens // 4} if name == "lory" else {}
    made = make_router(name, 8, experts, top_k, options, seed=0)
    given = {"router": name, "start": "upcycle", "num_experts": experts, "top_k": top_k, "router_options": options}
    return {**{key: value for key, value in given.items() if value}, "exact_start": made.start_sum is None}


def _try(task: Task, name: str, seed: int, output: Path) -> str | None:
    """One run; what went wrong in it, as the others go on."""
    try:
        _run_once(task, name, seed, output)
    except Exception as error:
        message = f"{task.name} {name} seed {seed}: {type(error).__name__}: {error}"
        print(message, flush=True)
        return message
    return None


def _run_once(task: Task, name: str, seed: int, output: Path) -> None:
    path = output / "runs" / f"{task.name}-{name.replace(', ', '-')}-{seed}.json"
    options = {} if name == DENSE else settings(name, task.tokens)
    key = {"task": task.name, "system": name, "seed": seed, "steps": task.steps, "options": options}
    if path.exists() and json.loads(path.read_text())["key"] == json.loads(json.dumps(key)):
        return
    start = time.perf_counter()
    result = _run(task, name, seed, options, output)
    _write(path, json.dumps({"key": key, **result, "seconds": time.perf_counter() - start}, indent=1))
    print(f"{task.name} {name} seed {seed}: {result}", flush=True)


def _run(task: Task, name: str, seed: int, options: dict[str, Any], output: Path) -> dict[str, Any]:
    model = _checkpoint(task, output)
    needs = () if name == DENSE else next(router.system.needs for router in ROUTERS if router.system.name == name)
    given = {"ids": task.has_ids, "labels": task.held_out[0].labels is not None}
    lacks = [need for need in needs if not given.get(need, True)]
    if lacks:
        return {"refused": f"needs {lacks[0]}, which this task does not have"}
    torch.manual_seed(seed)
    example = task.train(torch.Generator().manual_seed(seed))
    before = _evaluate(task, model, ())
    if name == DENSE:
        sparse: nn.Module = model
    else:
        kwargs = _labels(example, needs)
        sparse = sparsify(
            model, (example.inputs,), kwargs, select="all", allow_non_causal=True, seed=seed, **options
        )
    at_start = _evaluate(task, sparse, needs)
    step = _train(task, sparse, needs, seed)
    found: dict[str, Any] = {"checkpoint": before, "at_start": at_start, "quality": _evaluate(task, sparse, needs)}
    return {**found, **step, **(_compute(task, sparse, needs) if isinstance(sparse, SparseModel) else _dense(model))}


def _train(task: Task, model: nn.Module, needs: Sequence[str], seed: int) -> dict[str, Any]:
    """Train; return seconds of one core a step, and the routes of the last steps."""
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    model.train()
    seconds = [_step(task, model, needs, optimizer, generator) for _ in range(task.steps - _RECORDED)]
    if not isinstance(model, SparseModel):
        seconds += [_step(task, model, needs, optimizer, generator) for _ in range(_RECORDED)]
        return {"seconds_per_step": statistics.median(seconds)}
    with record_routing(model) as recorder:
        for _ in range(_RECORDED):
            _step(task, model, needs, optimizer, generator)
    stats = recorder.stats()
    return {
        "seconds_per_step": statistics.median(seconds),
        "train_max_load": stats.max_load,
        "train_unrouted": stats.unrouted_share,
        "train_experts_per_token": stats.experts_per_token,
    }


def _step(
    task: Task, model: nn.Module, needs: Sequence[str], optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> float:
    batch = task.train(generator)
    start = time.process_time()
    kwargs = _labels(batch, needs)
    logits = model(batch.inputs, **kwargs)
    losses = nn.functional.cross_entropy(logits.flatten(0, -2), batch.targets.flatten(), reduction="none")
    loss = losses.mean()
    if isinstance(model, SparseModel):
        if "reward" in needs:
            model.give_reward(-losses.detach())
        loss = loss + model.aux_loss()
        if "consistency" in needs:
            loss = loss + _second_pass(model, batch, kwargs, logits)
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"the loss is {loss.item()}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if isinstance(model, SparseModel):
        model.after_step()
    return time.process_time() - start


def _second_pass(model: SparseModel, batch: Batch, kwargs: dict[str, Any], first: Tensor) -> Tensor:
    """THOR: the loss of a second pass with other random experts, and the symmetric KL between the two."""
    second = model(batch.inputs, **kwargs)
    loss = nn.functional.cross_entropy(second.flatten(0, -2), batch.targets.flatten())
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return loss + 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()


@torch.no_grad()
def _evaluate(task: Task, model: nn.Module, needs: Sequence[str]) -> float:
    model.eval()
    values = [task.quality(model(batch.inputs, **_labels(batch, needs)), batch.targets) for batch in task.held_out]
    return float(torch.stack(values).mean())


def _labels(batch: Batch, needs: Sequence[str]) -> dict[str, Any]:
    return {"expert_labels": batch.labels} if "labels" in needs else {}


def _compute(task: Task, sparse: SparseModel, needs: Sequence[str]) -> dict[str, Any]:
    """Balance and FLOPs at inference, on the held-out data; experts by the rows that reach them."""
    sparse.eval()
    stats = sparse.routing_stats(((batch.inputs,), _labels(batch, needs)) for batch in task.held_out)
    flops = float(sum(ffn.flops_after for ffn in sparse.report.ffns if sparse.routers[ffn.name].merges))
    for layer in stats.layers:
        if sparse.routers[layer.name].merges:
            continue
        experts, router = (sparse.get_submodule(f"{layer.name}.{part}") for part in ("experts", "router"))
        flops += layer.experts_per_token * _products(experts, 3) / len(layer.tokens_per_expert) + _products(router, 2)
        if f"{layer.name}.shared" in dict(sparse.named_modules()):
            flops += _products(sparse.get_submodule(f"{layer.name}.shared"), 2)
    return {
        "max_load": stats.max_load,
        "unrouted": stats.unrouted_share,
        "experts_per_token": stats.experts_per_token,
        "ffn_flops_per_token": flops,
        "parameters": _count(sparse),
        "causal": all(router.causal for router in sparse.routers.values()),
    }


def _dense(model: nn.Module) -> dict[str, Any]:
    """FLOPs and parameters of the dense model."""
    ffns = [module for module in model.modules() if type(module).__name__ == "FeedForward"]
    return {"ffn_flops_per_token": sum(_products(ffn, 2) for ffn in ffns), "parameters": _count(model)}


def _products(module: nn.Module, rank: int) -> int:
    return 2 * sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == rank)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _checkpoint(task: Task, output: Path) -> nn.Module:
    """The dense model, trained once."""
    torch.manual_seed(0)
    model, path = task.build(), output / f"{task.name}-{task.dense_steps}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, task.dense_steps)
    model.train()
    for _ in range(task.dense_steps):
        _step(task, model, (), optimizer, generator)
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), f"{path}.{os.getpid()}")
    os.replace(f"{path}.{os.getpid()}", path)
    print(f"{task.name}: dense checkpoint after {task.dense_steps} steps: {_evaluate(task, model, ()):.3f}", flush=True)
    return model.eval()


def _table(task: Task, names: Sequence[str], output: Path) -> str:
    found = [json.loads(path.read_text()) for path in sorted(output.glob(f"runs/{task.name}-*.json"))]
    lines = [
        f"## {task.name}: {task.measure} after {task.steps} steps",
        "",
        f"| system | {task.measure} (spread) | at the start | max/mean load | no expert, training | experts a token | "
        "FFN MFLOPs a token | parameters | s a step |",
        "|---" * 9 + "|",
    ]
    for name in names:
        runs = [run for run in found if run["key"]["system"] == name]
        if runs and "refused" in runs[0]:
            lines.append(f"| {name} | {runs[0]['refused']} |" + " |" * 7)
        elif runs:
            lines.append(_row(name, runs))
    note = "\n† its router sees later tokens, in a model that predicts them: its figure is not comparable.\n"
    return "\n".join([*lines, note if task.name == "gpt" else ""])


def _row(name: str, runs: Sequence[dict[str, Any]]) -> str:
    def mean(key: str) -> float:
        return statistics.mean(run.get(key, math.nan) for run in runs)

    def cell(key: str, form: str) -> str:
        return "-" if math.isnan(mean(key)) else form.format(mean(key))

    qualities = [run["quality"] for run in runs]
    spread = f"{statistics.mean(qualities):.3f}"
    spread += f" ({max(qualities) - min(qualities):.3f})" if len(qualities) > 1 else ""
    seeds = "" if len(runs) == len(SEEDS) else f", {len(runs)} of {len(SEEDS)} seeds"
    mark = "" if runs[0].get("causal", True) else " †"
    flops = f"{mean('ffn_flops_per_token') / 1e6:.3f}"
    cells = [f"{name}{mark}{seeds}", spread, cell("at_start", "{:.3f}"), cell("max_load", "{:.2f}"),
             cell("train_unrouted", "{:.1%}"), cell("experts_per_token", "{:.2f}"), flops,
             f"{mean('parameters') / 1e3:.0f} k", f"{mean('seconds_per_step'):.4f}"]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    typer.run(main)
