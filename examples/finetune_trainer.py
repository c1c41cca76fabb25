"""Fine-tune a converted model of transformers with its `Trainer`, checkpoints and all.

    python examples/finetune_trainer.py --steps 200 --folder out/finetune_trainer

The experts go back into the modules of the original class (`graft`), so the Trainer sees the model it knows; the losses
of the routers are added to its loss. The dense model stands for yours: a small GPT-2 of random weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from sparsify import SparseModel, sparsify
from sparsify.models.text import corpus


class SparseTrainer(Trainer):
    """The Trainer, with the losses of the routers."""

    def __init__(self, sparse: SparseModel, **options: Any) -> None:
        super().__init__(**options)
        self.sparse = sparse  # shares its weights with the grafted model

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the model; in training, what the routers ask for on top."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = loss + self.sparse.aux_loss()
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimiser; routers that no gradient moves, such as deepseek-v3, follow its steps."""
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.register_step_post_hook(self.sparse.after_step)
        return optimizer


def main(steps: int = 200, folder: Path = Path("out/finetune_trainer"), resume: bool = False) -> SparseTrainer:
    """Convert, graft, train up to step number `steps`; `resume` goes on from the last checkpoint in `folder`."""
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4, use_cache=False))
    data = chunks()
    sparse = sparsify(
        dense, kwargs={"input_ids": data[:2]}, start="upcycle", router="gshard", num_experts=8, top_k=2
    )
    print(sparse.graft(dense))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, save_steps=steps,
        report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    dataset: Any = [{"input_ids": row, "labels": row} for row in data]
    trainer = SparseTrainer(sparse, model=dense, args=arguments, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=resume)
    sparse.eval().save(folder / "sparse")
    return trainer


def chunks() -> Tensor:
    """Rows of 64 bytes of text, int64 `[N, 64]`."""
    text = "\n\n".join(corpus().passages(50, characters=1000)).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, 64, 64)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("out/finetune_trainer"))
    parser.add_argument("--resume", action="store_true")
    main(**vars(parser.parse_args()))
