"""Fine-tune a converted model with a plain loop that saves its state and goes on where it was broken off.

    python examples/finetune_loop.py --steps 200 --folder out/finetune_loop

The dense model stands for yours: a small GPT of random weights. The text is the Python manual, byte by byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsify import SparseModel, sparsify
from sparsify.models.gpt import GPT, GPTConfig
from sparsify.models.text import corpus


def main(steps: int = 200, folder: Path = Path("out/finetune_loop")) -> SparseModel:
    """Convert, train up to step number `steps`, and write the model to `folder`."""
    torch.manual_seed(0)
    text = "\n\n".join(corpus().passages(100, characters=1000)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, 65, 64)  # [N, 65]
    sparse = convert(GPT(GPTConfig()), data[:2, :-1])
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-3)
    optimizer.register_step_post_hook(sparse.after_step)  # for routers that no gradient moves, such as deepseek-v3
    first, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        sparse.load_state_dict(state["model"])  # routers and their buffers are part of it
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])  # the noise of routers goes on, too
        first = state["step"]
    sparse.train()  # noise, capacity and losses of routers
    for step in range(first, steps):
        loss = train_step(sparse, optimizer, data[torch.arange(8) + 8 * step % (len(data) - 8)])
        print(f"step {step}: loss {loss:.3f}")
        if step % 50 == 49 or step == steps - 1:
            save(checkpoint, sparse, optimizer, step + 1)
    sparse.eval().save(folder)  # graph and weights: SparseModel.load(folder) needs no code of the model
    print(sparse.routing_stats([data[:32, :-1]]))
    return sparse


def convert(dense: GPT, example: Tensor) -> SparseModel:
    """Eight copies of each FFN, of which two run for a token, chosen by GShard's router."""
    return sparsify(dense, (example,), start="upcycle", router="gshard", num_experts=8, top_k=2)


def train_step(sparse: SparseModel, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    """One step on `batch` `[B, S + 1]`; the loss of the task."""
    logits = sparse(batch[:, :-1])
    loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    (loss + sparse.aux_loss()).backward()
    optimizer.step()
    return loss.item()


def save(path: Path, sparse: SparseModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """What the next start needs to go on as if it had not stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": sparse.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "random": torch.get_rng_state(), "step": step}, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("out/finetune_loop"))
    main(**vars(parser.parse_args()))
