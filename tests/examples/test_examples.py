"""The examples run, and what they save goes on as if it had never stopped."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify import SparseModel

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Any:
    """The module of an example, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(a: Any, b: Any) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(first == second and torch.equal(x, y) for (first, x), (second, y) in pairs)


def test_the_loop_resumes_exactly(tmp_path: Path) -> None:
    """Protects: stopped after 2 of 4 steps and started again, router noise included: the same weights bit by bit."""
    finetune = example("finetune_loop")
    whole = finetune.main(steps=4, folder=tmp_path / "whole")
    finetune.main(steps=2, folder=tmp_path / "parts")
    resumed = finetune.main(steps=4, folder=tmp_path / "parts")
    assert same(whole, resumed)
    assert same(whole, SparseModel.load(tmp_path / "parts"))


def test_the_trainer_runs_and_resumes(tmp_path: Path) -> None:
    """Protects: graft, Trainer, router losses and checkpoints work together; experts and routers move."""
    pytest.importorskip("transformers")
    finetune = example("finetune_trainer")
    trainer = finetune.main(steps=2, folder=tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in trainer.sparse.named_parameters()}
    resumed = finetune.main(steps=4, folder=tmp_path, resume=True)
    assert resumed.state.global_step == 4
    moved = [name for name, p in resumed.sparse.named_parameters() if not torch.equal(p, before[name])]
    assert any(".experts." in name for name in moved)
    assert any(".router." in name for name in moved)
    loaded = SparseModel.load(tmp_path / "sparse")
    ids = finetune.chunks()[:3]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids)["logits"], resumed.model.eval()(input_ids=ids).logits)
