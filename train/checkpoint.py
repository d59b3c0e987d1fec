"""The state of a run in one file that is whole or absent, so that kill -9 costs only some steps.

A checkpoint holds the factors and the optimizer's state.
Everything else a run depends on (learning rate, order of the images, noise, dropped captions) is
a function of the seed and the step, so there is no generator or position to save.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from merge.formats.reader import TensorFile
from merge.formats.writer import write_file
from train.errors import CannotResume
from train.inject import Adapter

KEPT = 2
_NAME = re.compile(r"step-(\d{7})\.safetensors")


@dataclass(frozen=True, slots=True)
class Identity:
    """What two runs must share for one to continue the other."""

    config: str
    dataset: str
    base: str


def save_checkpoint(
    folder: Path,
    step: int,
    loss: float,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    identity: Identity,
) -> Path:
    """Write the state after `step` steps, then remove all but the newest KEPT."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:07d}.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, parameter in adapter.named_parameters():
        tensors[f"factor/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = torch.as_tensor(value).detach()
    write_file(path, tensors, {**asdict(identity), "step": str(step), "loss": str(loss)})
    for old in _checkpoints(folder)[:-KEPT]:
        old.unlink()
    return path


def restore_checkpoint(
    folder: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, identity: Identity
) -> tuple[int, float]:
    """Put the newest state into adapter and optimizer; its step and loss, (0, nan) without one."""
    newest = latest_checkpoint(folder)
    if newest is None:
        return 0, math.nan
    with TensorFile(newest) as file:
        _require_same_run(folder, identity, file.header.metadata)
        names = list(file.header.tensors)
        states: dict[int, dict[str, Tensor]] = {}
        for index, (name, parameter) in enumerate(adapter.named_parameters()):
            with torch.no_grad():
                parameter.copy_(file.read_tensor(f"factor/{name}"))
            prefix = f"optimizer/{name}/"
            states[index] = {
                key.removeprefix(prefix): file.read_tensor(key)
                for key in names
                if key.startswith(prefix)
            }
        metadata = file.header.metadata
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    return int(metadata["step"]), float(metadata["loss"])


def latest_checkpoint(folder: Path) -> Path | None:
    found = _checkpoints(folder)
    return found[-1] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first; the names sort as the steps do."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _require_same_run(folder: Path, identity: Identity, metadata: Mapping[str, str]) -> None:
    for what, now in asdict(identity).items():
        if metadata[what] != now:
            raise CannotResume(
                folder, f"the checkpoint was made with another {what}; remove it to start over"
            )
