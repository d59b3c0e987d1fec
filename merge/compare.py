"""Two outputs, tensor by tensor and bit by bit, in bounded memory: two pieces of 1 MiB.

Where bits differ, the values are compared. Values count as equal within rounding if
|a - b| <= step * max(|a|, |b|) + 1e-5 * (the tensor's largest magnitude), with the dtype's step
between neighbouring values (float16 2^-10, bfloat16 2^-7): float32 arithmetic in another order
moves a sum by about that, and storing may then round it the other way.
Factors of an adapter are also equal if their product is, within step (float32: 1e-4) of its
Frobenius norm: singular vectors of close singular values may come out turned.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf, isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from merge.algorithms import lora, read_change
from merge.errors import BadAdapter
from merge.formats import metadata as names
from merge.formats.adapters import CONFIG_NAME, Entry, read_config, read_layout
from merge.formats.header import DTYPE_BITS, Header
from merge.formats.reader import TORCH_DTYPES, TensorFile
from merge.methods.linear import concatenate

PIECE_BYTES = 2**20
STEPS = {
    "F64": 2.0**-52,
    "F32": 2.0**-23,
    "F16": 2.0**-10,
    "BF16": 2.0**-7,
    "F8_E4M3": 2.0**-3,
    "F8_E5M2": 2.0**-2,
}
FLOOR = 1e-5
_PRODUCT_STEPS = STEPS | {"F32": 1e-4}
# Metadata that decides what the tensors mean.
_DECISIVE = names.DIFFUSERS_CONFIG


class Verdict(StrEnum):
    BYTES = "identical bytes"
    TENSORS = "identical tensors"
    ROUNDING = "equal within rounding"
    DIFFERS = "differs"


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that is not bit for bit the same. `largest` is the greatest difference of two
    values as a share of the tensor's largest magnitude, None where there is none to give.
    """

    file: str
    tensor: str
    what: str
    is_rounding: bool = False
    differing: int = 0
    values: int = 0
    largest: float | None = None

    def to_json(self) -> dict[str, Any]:
        shown = {"file": self.file} if self.file else {}
        return shown | {
            "tensor": self.tensor,
            "what": self.what,
            "is_rounding": self.is_rounding,
            "differing": self.differing,
            "values": self.values,
            "largest": self.largest,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found: of `tensors` that the recipe makes, `same` are bit for bit. `wrong` is what else makes the file another one, `notes` what does not."""

    tensors: int
    same: int
    differences: tuple[Difference, ...]
    wrong: tuple[str, ...]
    notes: tuple[str, ...]
    same_bytes: bool

    @property
    def verdict(self) -> Verdict:
        if self.wrong or not all(its.is_rounding for its in self.differences):
            return Verdict.DIFFERS
        if self.differences:
            return Verdict.ROUNDING
        return Verdict.BYTES if self.same_bytes else Verdict.TENSORS


def compare(made: Path, given: Path, *, may_round: bool) -> Comparison:
    """What `given` has that `made` has not, and the other way; both are files, or both folders.

    With `may_round`, values that rounding explains do not make them differ.
    """
    found: list[Comparison] = []
    pairs, notes = _pairs(made, given)
    for name, one, other in pairs:
        if not other.is_file():
            found.append(_other_file(f"{name} is missing"))
        elif one.suffix == ".safetensors":
            found.append(_compare_tensors(name if len(pairs) > 1 else "", one, other, may_round))
        else:
            found.append(_compare_text(name, one, other))
    return Comparison(
        sum(its.tensors for its in found),
        sum(its.same for its in found),
        tuple(difference for its in found for difference in its.differences),
        tuple(text for its in found for text in its.wrong),
        (*(text for its in found for text in its.notes), *notes),
        all(its.same_bytes for its in found),
    )


def _pairs(made: Path, given: Path) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """(name, file that was made, the one it is compared with); and what else lies there."""
    if made.is_file():
        return [("", made, given)], []
    files = [file for file in sorted(made.rglob("*")) if file.is_file()]
    if given.is_file():  # a PEFT adapter may have another name than PEFT gives it
        weights = [file for file in files if file.suffix == ".safetensors"]
        beside = [file for file in files if file.name == CONFIG_NAME]
        pairs = [(given.name, file, given) for file in weights]
        return pairs + [(CONFIG_NAME, file, given.with_name(CONFIG_NAME)) for file in beside], []
    wanted = {file.relative_to(made).as_posix(): file for file in files}
    others = [
        name
        for name in sorted(f.relative_to(given).as_posix() for f in given.rglob("*") if f.is_file())
        if name not in wanted and not name.startswith(".") and "/." not in name
    ]
    notes = [f"the recipe does not make {name}" for name in others]
    return [(name, file, given / name) for name, file in wanted.items()], notes


def _other_file(what: str) -> Comparison:
    return Comparison(0, 0, (), (what,), (), False)


def _compare_text(name: str, made: Path, given: Path) -> Comparison:
    one, other = made.read_bytes(), given.read_bytes()
    if one == other:
        return Comparison(0, 0, (), (), (), True)
    fields = _changed_fields(one, other)
    if fields is None:
        return _other_file(f"{name} has other bytes")
    if not fields:
        return Comparison(0, 0, (), (), (f"{name} says the same in another form",), False)
    return _other_file(f"{name} says otherwise: {', '.join(fields)}")


def _changed_fields(one: bytes | str, other: bytes | str) -> list[str] | None:
    """The top-level fields in which two JSON objects differ; None if one is no object."""
    try:
        first, second = json.loads(one), json.loads(other)
    except (ValueError, RecursionError):
        return None
    if not isinstance(first, dict) or not isinstance(second, dict):
        return None
    absent = object()
    return sorted(k for k in first | second if first.get(k, absent) != second.get(k, absent))


def _compare_tensors(name: str, made: Path, given: Path, may_round: bool) -> Comparison:
    with TensorFile(made) as one, TensorFile(given) as other:
        differences = [
            difference
            for key in sorted({*one.header.tensors, *other.header.tensors})
            if (difference := _compare_tensor(name, key, one, other)) is not None
        ]
        wrong, notes = _compare_metadata(name, one.header, other.header)
        if may_round:
            turned = _same_products(made, given, one, other, differences)
            differences = [turned.get(its.tensor, its) for its in differences]
        else:
            differences = [replace(its, is_rounding=False) for its in differences]
        n_tensors = len(one.header.tensors)
        same = n_tensors - sum(its.tensor in one.header.tensors for its in differences)
        is_same = not differences and _head(made, one.header) == _head(given, other.header)
    return Comparison(n_tensors, same, tuple(differences), tuple(wrong), tuple(notes), is_same)


def _head(path: Path, header: Header) -> bytes:
    with path.open("rb") as file:
        return file.read(header.data_offset)


def _compare_tensor(file: str, key: str, one: TensorFile, other: TensorFile) -> Difference | None:
    first, second = one.header.tensors.get(key), other.header.tensors.get(key)
    if first is None:
        return Difference(file, key, "the recipe makes no such tensor")
    if second is None:
        return Difference(file, key, "is missing")
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        found, wanted = _shown(second.dtype, second.shape), _shown(first.dtype, first.shape)
        return Difference(file, key, f"is {found} where the recipe makes {wanted}")
    if all(np.array_equal(a, b) for a, b in _pieces(key, one, other)):
        return None
    return _differing_values(file, key, one, other)


def _shown(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


Bytes = NDArray[np.uint8]


def _pieces(key: str, one: TensorFile, other: TensorFile) -> Iterator[tuple[Bytes, Bytes]]:
    """The stored bytes of a tensor in both files, piece by piece, in memory that is used again."""
    size = one.header.tensors[key].size_bytes
    buffers = [bytearray(min(PIECE_BYTES, size)) for _ in (one, other)]
    for start in range(0, size, PIECE_BYTES):
        length = min(PIECE_BYTES, size - start)
        for source, buffer in zip((one, other), buffers, strict=True):
            source.read_into(key, memoryview(buffer)[:length], start)
        first, second = (np.frombuffer(buffer, np.uint8, length) for buffer in buffers)
        yield first, second


def _differing_values(file: str, key: str, one: TensorFile, other: TensorFile) -> Difference:
    info = one.header.tensors[key]
    item = max(1, DTYPE_BITS[info.dtype] // 8)
    step = STEPS.get(info.dtype)
    differing, apart, excess, largest = 0, 0.0, 0.0, 0.0
    for a, b in _pieces(key, one, other):
        differs = (a != b).reshape(-1, item).any(1)
        differing += int(differs.sum())
        if step is None:
            continue
        x, y = _values(a, info.dtype), _values(b, info.dtype)
        magnitude = torch.maximum(x.abs(), y.abs())
        distance = (x - y).abs()
        if not distance.isfinite().all():  # NaN or Inf in one of them
            apart = excess = inf
            continue
        largest = max(largest, magnitude.max().item())
        apart = max(apart, distance.max().item())
        excess = max(excess, (distance - step * magnitude).max().item())
    is_rounding = step is not None and isfinite(apart) and excess <= FLOOR * largest
    share = apart / largest if step is not None and largest and isfinite(apart) else None
    what = f"{differing} of {prod(info.shape)} values differ"
    return Difference(file, key, what, is_rounding, differing, prod(info.shape), share)


def _values(stored: Bytes, dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(stored).view(getattr(torch, TORCH_DTYPES[dtype]))
    return tensor.double()


def _same_products(
    made: Path, given: Path, one: TensorFile, other: TensorFile, found: Sequence[Difference]
) -> dict[str, Difference]:
    """Differences of factors whose product is the same within rounding, by key."""
    keys = {its.tensor for its in found if not its.is_rounding and its.values}
    if not keys or len(keys) < len([its for its in found if not its.is_rounding]):
        return {}
    try:
        layouts = [
            read_layout(file.header, name=path.name, config=read_config(path))
            for file, path in ((one, made), (other, given))
        ]
    except BadAdapter:  # a checkpoint
        return {}
    others = {entry.name: entry for entry in layouts[1].entries}
    turned = {}
    for entry in layouts[0].entries:
        its_keys = keys & set(entry.keys.values())
        if not its_keys or entry.name not in others:
            continue
        share = _distance_of_products((entry, one), (others[entry.name], other))
        step = max(_PRODUCT_STEPS.get(one.header.tensors[key].dtype, 0.0) for key in its_keys)
        if share is not None and share <= step:
            what = f"other factors of the same product, to {share:.2g} of its norm"
            for its in found:
                if its.tensor in entry.keys.values():
                    turned[its.tensor] = replace(its, what=what, is_rounding=True)
    return turned


def _distance_of_products(*places: tuple[Entry, TensorFile]) -> float | None:
    """|A - B| / |A| of two layers' changes; None where they are no products."""
    factors = []
    for entry, file in places:
        tensors = {role: file.read_tensor(key).double() for role, key in entry.keys.items()}
        change = read_change(entry.layout, tensors, entry.layer.shape, entry.facts)
        factors.append(change.factors())
    first, second = factors
    if first is None or second is None:
        return None
    norm = lora.norm(first)
    apart = lora.norm(concatenate([first, second], [1.0, -1.0]))
    return apart / norm if norm else None


def _compare_metadata(name: str, made: Header, given: Header) -> tuple[list[str], list[str]]:
    """(what makes it another file, what is worth saying)."""
    at = f"{name}: " if name else ""
    wrong, notes = [], []
    for key in sorted({*made.metadata, *given.metadata}):
        one, other = made.metadata.get(key), given.metadata.get(key)
        if one == other:
            continue
        if key == _DECISIVE and _changed_fields(one or "{}", other or "{}") != []:
            wrong.append(f"{at}{key} says otherwise")
        elif key == names.GRAFT_CERTIFICATE and one is not None and other is not None:
            false = _false_claims(made, given)
            wrong += [f"{at}its certificate says {claim}" for claim in false[:3]]
        else:
            state = "is not in it" if other is None else "was added" if one is None else "differs"
            notes.append(f"{at}metadata {key} {state}")
    return wrong, notes


def _false_claims(made: Header, given: Header) -> list[str]:
    """Figures of a certificate that are not those of the rebuilt file, if one engine wrote both."""
    if made.metadata.get(names.GRAFT_VERSION) != given.metadata.get(names.GRAFT_VERSION):
        return []
    one, other = (names.read_json(h.metadata, names.GRAFT_CERTIFICATE) for h in (made, given))
    return list(_unlike("", one, other))


def _unlike(path: str, true: Any, said: Any) -> Iterator[str]:
    if isinstance(true, dict) and isinstance(said, dict):
        for key in sorted({*true, *said}):
            yield from _unlike(f"{path}.{key}".strip("."), true.get(key), said.get(key))
    elif isinstance(true, float | int) and isinstance(said, float | int):
        # Figures have four digits, and rounding errors are themselves subject to rounding.
        if abs(true - said) > 0.02 * abs(true) + 1e-5:
            yield f"{path} {said:g} where it is {true:g}"
    elif true != said:
        yield f"{path} {json.dumps(said)[:80]} where it is {json.dumps(true)[:80]}"
