"""The adapters of a plan, open: factors of a module in the dtype they are computed in."""

from collections.abc import Sequence
from contextlib import ExitStack
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from merge.algorithms import lora
from merge.errors import BadFile, NotFinite
from merge.formats.header import Header
from merge.formats.reader import TensorFile
from merge.plan import Adapter, Module, Term


def open_as_planned(path: Path, header: Header) -> TensorFile:
    """The file, if its header is still the one that was planned with."""
    file = TensorFile(path)
    if file.header != header:
        file.close()
        raise BadFile(path.name, "st_changed", "the file changed after it was planned with")
    return file


class Inputs:
    """Opens every adapter once; `factors` may be called from several threads."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = adapters
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._files = [
                stack.enter_context(open_as_planned(adapter.path, adapter.header))
                for adapter in self._adapters
            ]
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def parts(self, module: Module, dtype: torch.dtype) -> tuple[list[lora.Factors], list[float]]:
        """Factors and strengths of every contribution to a module; refuses NaN and Inf."""
        return (
            [self._factors(term, dtype) for term in module.terms],
            [term.strength for term in module.terms],
        )

    def _factors(self, term: Term, dtype: torch.dtype) -> lora.Factors:
        file, adapter = self._files[term.adapter], self._adapters[term.adapter]
        tensors = {}
        for role in ("down", "up"):
            key = term.entry.keys[role]
            tensors[role] = file.read_tensor(key).to(dtype)
            # One NaN or Inf makes the sum NaN or Inf; a finite sum of finite float32 may still
            # overflow, so only then is every value looked at.
            if not isfinite(tensors[role].sum().item()) and not tensors[role].isfinite().all():
                raise NotFinite(adapter.name, key)
        return lora.parse(tensors["down"], tensors["up"], self._scale(term))

    def _scale(self, term: Term) -> float:
        """alpha / rank; 1 without an alpha, as readers of kohya's and diffusers' files have it."""
        key = term.entry.keys.get("alpha")
        if key is None:
            return float(term.entry.facts.get("scale", 1.0))
        alpha = self._files[term.adapter].read_scalar(key)
        if not isfinite(alpha):
            raise NotFinite(self._adapters[term.adapter].name, key)
        return alpha / term.rank
