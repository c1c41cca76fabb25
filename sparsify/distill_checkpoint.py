"""State of a training as one safetensors file: the trained parameters, Adam's moments, and how far it came."""

from __future__ import annotations

import os
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    file: Path, optimizer: torch.optim.Optimizer, names: dict[int, str], step: int, settings: str
) -> None:
    """Write the state; the file appears whole, or the old one stays.

    Args:
        file: where.
        optimizer: Adam, after `step` steps.
        names: of its parameters, by id.
        step: how many are done.
        settings: of the training, to be compared when it is resumed.
    """
    tensors: dict[str, torch.Tensor] = {}
    for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        name, state = names[id(parameter)], optimizer.state.get(parameter, {})
        tensors[f"{name}/value"] = parameter.detach().cpu().contiguous()
        for moment in _MOMENTS:  # none where no gradient ever came
            tensors[f"{name}/{moment}"] = state.get(moment, torch.zeros_like(parameter)).detach().cpu().contiguous()
    staging = file.with_name(f"{file.name}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, staging, metadata={"training": f"step {step} of {settings}"})
    os.replace(staging, file)


def load_checkpoint(file: Path, optimizer: torch.optim.Optimizer, names: dict[int, str], settings: str) -> int:
    """Bring model and optimizer to where the file left them.

    Returns:
        The steps that are done; 0 where there is no file.

    Raises:
        ValueError: the file is damaged, or of another training.
    """
    if not file.is_file():
        return 0
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            done, _, found = (stored.metadata() or {}).get("training", "").removeprefix("step ").partition(" of ")
            keys = set(stored.keys())
            wanted = {f"{names[id(p)]}/{part}" for p in parameters for part in ("value", *_MOMENTS)}
            if found != settings or keys != wanted:
                raise ValueError(
                    f"{file} is of another training ({found or 'no training'}), not of {settings}; give another file, "
                    "or delete it to start again"
                )
            with torch.no_grad():
                for parameter in parameters:
                    name = names[id(parameter)]
                    parameter.copy_(stored.get_tensor(f"{name}/value"))
                    moments = {moment: stored.get_tensor(f"{name}/{moment}").to(parameter) for moment in _MOMENTS}
                    optimizer.state[parameter] = {"step": torch.tensor(float(done)), **moments}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}; delete it to start again") from error
    return int(done)
