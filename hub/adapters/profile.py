"""How the numbers of a file spread over its depth: what a file without a picture is drawn from."""

import math
import re
from collections.abc import Sequence

from merge.formats.reader import TensorFile

BINS = 24
FLAT = "5" * BINS
# The start of a tensor says enough about its scale, and a 6 GB file stays a matter of moments.
_SAMPLE_BYTES = 16 * 1024
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


def profile_of(file: TensorFile) -> str:
    """24 digits from 0 to 9: log of the root mean square of the tensors, in order of their names.

    A LoRA's `down` is random at any scale and says nothing about what was learned, so where
    there are others, those factors are left out.
    """
    names = sorted(file.header.tensors, key=_natural)
    learned = [name for name in names if not re.search(r"lora_(down|A)\b|\.alpha$", name)]
    levels = [level for name in learned or names if (level := _level(file, name)) is not None]
    if not levels:
        return FLAT
    binned = [
        _mean(levels[i * len(levels) // BINS :][: len(levels) // BINS + 1]) for i in range(BINS)
    ]
    low, high = min(binned), max(binned)
    if high - low < 1e-6:
        return FLAT
    return "".join(str(round(9 * (value - low) / (high - low))) for value in binned)


def _level(file: TensorFile, name: str) -> float | None:
    info = file.header.tensors[name]
    import numpy as np  # Nobody who starts a hub waits for it.

    size = min(_SAMPLE_BYTES, info.size_bytes // 8 * 8)
    if size == 0 or info.dtype not in (*_FLOATS, "BF16"):
        return None
    buffer = bytearray(size)
    file.read_into(name, memoryview(buffer))
    if info.dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        values = (np.frombuffer(buffer, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(buffer, _FLOATS[info.dtype])
    with np.errstate(all="ignore"):
        mean_square = float(np.mean(np.square(values.astype(np.float64))))
    if not math.isfinite(mean_square) or mean_square <= 0:
        return None
    return max(-12.0, 0.5 * math.log10(mean_square))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", name) if p]
