"""Errors of training and publishing. Each message is one sentence a user can act on.

TrainError
├── BadConfig          the YAML asks for something impossible     .file .param
├── BadBase            the base is not a pipeline we can train    .base
├── BadDataset         images or captions that cannot be used     .where
├── CannotResume       no checkpoint, or one of another run       .folder
├── OutputExists       a result or unfinished run is in the way   .folder
├── NonFiniteLoss      NaN or Inf before an optimizer step        .step .images
├── NoGradient         targets that would stay untrained          .modules
├── OutOfMemory        the device is too small for this run       .step
├── BaseChanged        a frozen tensor has other bytes at the end .component
├── Interrupted        stopped on request, after a checkpoint     .step
├── BadResult          a folder that is not a finished run        .folder
└── CannotPublish      the target refused or lost something       .target
"""

from collections.abc import Sequence
from pathlib import Path


class TrainError(Exception):
    """Anything training or publishing refuses."""

    @property
    def code(self) -> str:
        return type(self).__name__


class BadConfig(TrainError):
    """The configuration cannot be used; `param` is the path of the field in it."""

    def __init__(self, file: str, param: str, detail: str) -> None:
        field = f" field {param}:" if param else ""
        super().__init__(f"{file}:{field} {detail}")
        self.file = file
        self.param = param


class BadBase(TrainError):
    """The base is missing or not a pipeline this trainer knows."""

    def __init__(self, base: str, detail: str) -> None:
        super().__init__(f"base {base}: {detail}")
        self.base = base


class BadDataset(TrainError):
    """An image or caption cannot be used; nothing is left out silently."""

    def __init__(self, where: str, detail: str) -> None:
        super().__init__(f"dataset {where}: {detail}")
        self.where = where


class CannotResume(TrainError):
    """There is nothing to continue from, or it belongs to another configuration."""

    def __init__(self, folder: Path, detail: str) -> None:
        super().__init__(f"{folder}: {detail}")
        self.folder = folder


class OutputExists(TrainError):
    """Something of value is where the output would go."""

    def __init__(self, folder: Path, detail: str) -> None:
        super().__init__(f"{folder}: {detail}")
        self.folder = folder


class NonFiniteLoss(TrainError):
    """The loss became NaN or Inf; the weights are those before this step."""

    def __init__(self, step: int, images: Sequence[str]) -> None:
        super().__init__(
            f"the loss is not finite at step {step}, on {', '.join(images)}; "
            "the last checkpoint is kept, lower the learning rate or look at these images"
        )
        self.step = step
        self.images = tuple(images)


class NoGradient(TrainError):
    """Adapter modules that the loss does not reach."""

    def __init__(self, modules: Sequence[str]) -> None:
        more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
        super().__init__(
            f"{len(modules)} targets get no gradient at the first step and would stay untrained: "
            f"{', '.join(modules[:3])}{more}"
        )
        self.modules = tuple(modules)


class OutOfMemory(TrainError):
    """The device's memory is full; the last checkpoint is kept."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"the device's memory is full at step {step}; use a smaller batch, resolution or "
            "targets, or precision bfloat16"
        )
        self.step = step


class BaseChanged(TrainError):
    """Training touched what it promised to freeze."""

    def __init__(self, component: str) -> None:
        super().__init__(f"{component} of the base changed during training; nothing was written")
        self.component = component


class Interrupted(TrainError):
    """Stopped on request; a checkpoint of this step is on disk."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}; run again with --resume to continue")
        self.step = step


class BadResult(TrainError):
    """Not the folder of a finished run, or its files are no longer what its manifest says."""

    def __init__(self, folder: Path, detail: str) -> None:
        super().__init__(f"{folder}: {detail}")
        self.folder = folder


class CannotPublish(TrainError):
    """The target refused, or what it holds is not what was sent."""

    def __init__(self, target: str, detail: str) -> None:
        super().__init__(f"{target}: {detail}")
        self.target = target
