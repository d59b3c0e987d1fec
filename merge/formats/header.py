"""Read and validate the header of a safetensors file.

The rules are those of `docs/formats/safetensors.md`; each has a stable `reason` code.
They are stricter than the safetensors library where two readers of one file could disagree.
No size is allocated before it was compared with the real size of the file.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

from merge.errors import BadFile
from merge.formats.sources import File, Source, opened, read_bytes

PREFIX_BYTES = 8
METADATA = "__metadata__"

# Bits per element; the names are those of safetensors 0.8.
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "BOOL": 8,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "C64": 64,
        "F64": 64,
        "I64": 64,
        "U64": 64,
    }
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a header may cost. Adapters stay far below all of these."""

    header_bytes: int = 16 * 2**20
    leading_spaces: int = 4096
    tensors: int = 20_000
    name_bytes: int = 512
    dims: int = 8
    dim: int = 2**31
    metadata_keys: int = 4096
    # Trainers embed tag tables and thumbnails of several MB (reference: kohya's `ssmd_cover_images`).
    metadata_bytes: int = 8 * 2**20


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header describes it; `begin` and `end` are bytes in the data region."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin

    @property
    def n_elements(self) -> int:
        return _product(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A header that kept every rule. `tensors` is in file order, by offset."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_offset: int
    file_size: int
    leading_spaces: int = 0  # legal for the library, refused by readers that follow the text


def read_header(file: File, *, name: str | None = None, limits: Limits = DEFAULT_LIMITS) -> Header:
    """The header of a file; BadFile names the rule that a malformed one breaks.

    `name` is what messages call a file that is here, by default the last part of its path.
    """
    with opened(file, name=name) as source:
        return header_of(source, limits=limits)


def header_of(source: Source, *, limits: Limits = DEFAULT_LIMITS) -> Header:
    """The same of bytes that are open already."""
    prefix = bytes(read_bytes(source, 0, min(source.size, PREFIX_BYTES)))
    length = header_length(prefix, source.size, source.name, limits=limits)
    text = bytes(read_bytes(source, PREFIX_BYTES, length))
    return parse_header(prefix + text, source.size, source.name, limits=limits)


def header_length(
    prefix: bytes, file_size: int, name: str, *, limits: Limits = DEFAULT_LIMITS
) -> int:
    """How many bytes of JSON follow the first eight, already checked against the file's size."""
    if file_size < PREFIX_BYTES or len(prefix) < PREFIX_BYTES:
        detail = "the file is empty" if file_size == 0 else f"only {file_size} bytes long"
        raise BadFile(name, "st_too_small", f"{detail}, which is no safetensors file")
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length == 0:
        raise BadFile(name, "st_header_empty", "the header has length 0")
    if length > limits.header_bytes:
        for magic, what in _MAGIC:
            if prefix.startswith(magic):
                detail = f"it is {what}, not a safetensors file"
                if "pickle" in what:
                    detail += "; graft convert --from-pickle makes one of it"
                raise BadFile(name, "st_other_format", detail)
        detail = f"the header claims {length} bytes, more than the limit {limits.header_bytes}: "
        detail += "no safetensors file, or a damaged one"
        raise BadFile(name, "st_header_too_large", detail)
    if length > file_size - PREFIX_BYTES:
        detail = f"the header claims {length} bytes in a file of {file_size}"
        raise BadFile(name, "st_header_beyond_file", detail)
    return length


def parse_header(
    head: bytes, file_size: int, name: str, *, limits: Limits = DEFAULT_LIMITS
) -> Header:
    """The same from bytes already read: `head` begins at byte 0 and holds the whole header."""
    length = header_length(head, file_size, name, limits=limits)
    text = head[PREFIX_BYTES : PREFIX_BYTES + length]
    if len(text) < length:
        raise BadFile(name, "st_short_read", "the file became shorter while it was read")
    stripped = text.lstrip(b" ")
    leading_spaces = len(text) - len(stripped)
    if leading_spaces > limits.leading_spaces:
        raise BadFile(name, "st_leading_spaces", f"{leading_spaces} blanks before the header")
    entries = _Parser(name, limits).parse(stripped)
    metadata = _metadata(entries, name, limits)
    data_bytes = file_size - PREFIX_BYTES - length
    tensors = _tensors(entries, data_bytes, name, limits)
    return Header(
        tensors=MappingProxyType(tensors),
        metadata=MappingProxyType(metadata),
        data_offset=PREFIX_BYTES + length,
        file_size=file_size,
        leading_spaces=leading_spaces,
    )


class _Repeated(dict[str, Any]):
    """An object in which a key occurred twice; JSON parsers would keep the last in silence."""

    key: str = ""


class _Parser:
    """Text of a header -> its top-level object, refusing what JSON parsers disagree about."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits

    def parse(self, text: bytes) -> dict[str, Any]:
        if not text.startswith(b"{"):
            self._refuse("st_not_object", "the header does not begin with '{'")
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            self._refuse("st_not_utf8", f"byte {error.start} of the header is not UTF-8")
        self._check_structure(text)
        try:
            entries = json.loads(
                decoded, object_pairs_hook=_unique, parse_constant=self._refuse_constant
            )
        except json.JSONDecodeError as error:
            self._refuse("st_not_json", f"the header is not JSON: {error.msg} at {error.pos}")
        except RecursionError:
            self._refuse("st_too_deep", "the header is nested too deeply")
        except ValueError:  # an integer of more digits than Python converts
            self._refuse("st_bad_number", "the header holds a number of thousands of digits")
        if isinstance(entries, _Repeated):
            kind = "st_duplicate_metadata" if entries.key == METADATA else "st_duplicate_tensor"
            self._refuse(kind, f"{shown(entries.key)} occurs twice in the header")
        assert isinstance(entries, dict)  # it begins with '{'
        return entries

    def _check_structure(self, text: bytes) -> None:
        """Bound depth and number of brackets before any becomes an object in memory; no -0."""
        outside = _STRING.sub(b"", text)
        if b"-0" in outside:  # 0 for Python, no count for the library
            self._refuse("st_bad_number", "the header holds the number -0")
        brackets = outside.translate(None, delete=_NOT_BRACKETS)
        n_brackets = len(brackets)
        for _ in range(4):  # a legal header is three deep: { tensor: { shape: [ ] } }
            brackets = brackets.replace(b"{}", b"").replace(b"[]", b"")
        if b"{}" in brackets or b"[]" in brackets:
            self._refuse("st_too_deep", "the header is nested too deeply")
        if n_brackets > 6 * self.limits.tensors + 4:
            detail = f"the header describes more than {self.limits.tensors} tensors"
            self._refuse("st_too_many_tensors", detail)

    def _refuse_constant(self, literal: str) -> NoReturn:
        self._refuse("st_nonfinite_number", f"the header holds the literal {literal}")

    def _refuse(self, reason: str, detail: str) -> NoReturn:
        raise BadFile(self.name, reason, detail)


_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) == len(pairs):
        return unique
    repeated = _Repeated(unique)
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            repeated.key = key
            break
        seen.add(key)
    return repeated


def _metadata(entries: dict[str, Any], name: str, limits: Limits) -> dict[str, str]:
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict):
        raise BadFile(name, "st_metadata_not_object", "__metadata__ is not an object")
    if isinstance(metadata, _Repeated):
        detail = f"{shown(metadata.key)} occurs twice in __metadata__"
        raise BadFile(name, "st_duplicate_metadata_key", detail)
    if len(metadata) > limits.metadata_keys:
        detail = f"__metadata__ has {len(metadata)} keys, more than {limits.metadata_keys}"
        raise BadFile(name, "st_metadata_too_many_keys", detail)
    size = 0
    for key, value in metadata.items():
        if not isinstance(value, str):
            detail = f"__metadata__ value of {shown(key)} is not a string"
            raise BadFile(name, "st_metadata_not_strings", detail)
        size += _utf8_length(key, name) + _utf8_length(value, name)
    if size > limits.metadata_bytes:
        detail = f"__metadata__ holds {size} bytes, more than {limits.metadata_bytes}"
        raise BadFile(name, "st_metadata_too_large", detail)
    return metadata


def _tensors(
    entries: dict[str, Any], data_bytes: int, name: str, limits: Limits
) -> dict[str, TensorInfo]:
    if not entries:
        raise BadFile(name, "st_no_tensors", "the file holds no tensor")
    if len(entries) > limits.tensors:
        detail = f"{len(entries)} tensors, more than {limits.tensors}"
        raise BadFile(name, "st_too_many_tensors", detail)
    found = []
    for key, entry in entries.items():
        _check_name(key, name, limits)
        found.append((key, _tensor_info(key, entry, data_bytes, name, limits)))
    found.sort(key=_position)
    _check_contiguous(found, data_bytes, name)
    return dict(found)


def _position(item: tuple[str, TensorInfo]) -> tuple[int, int]:
    return item[1].begin, item[1].end


def _check_name(key: str, name: str, limits: Limits) -> None:
    length = _utf8_length(key, name)
    if length > limits.name_bytes:
        detail = f"a tensor name of {length} bytes, more than {limits.name_bytes}"
        raise BadFile(name, "st_name_too_long", detail)
    # ASCII is the common case by far and is NFC by definition.
    if key.isascii() and key.isprintable() and key and ".." not in key:
        return
    bad = (
        not key
        or any(unicodedata.category(c) == "Cc" for c in key)
        or ".." in re.split(r"[/\\]", key)
        or not unicodedata.is_normalized("NFC", key)
    )
    if bad:
        raise BadFile(name, "st_bad_name", f"the tensor name {shown(key)} is not allowed")


def _tensor_info(key: str, entry: Any, data_bytes: int, name: str, limits: Limits) -> TensorInfo:
    if not isinstance(entry, dict):
        raise BadFile(name, "st_bad_entry", f"the entry of {shown(key)} is not an object")
    if isinstance(entry, _Repeated):
        detail = f"{shown(entry.key)} occurs twice in the entry of {shown(key)}"
        raise BadFile(name, "st_duplicate_field", detail)
    if entry.keys() != _FIELDS:
        _refuse_fields(key, entry, name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        detail = f"{shown(key)} has the unknown dtype {shown(str(dtype))}"
        raise BadFile(name, "st_unknown_dtype", detail)
    if not _are_counts(shape):
        raise BadFile(name, "st_bad_shape", f"{shown(key)} has no list of sizes as its shape")
    if len(shape) > limits.dims:
        detail = f"{shown(key)} has {len(shape)} dimensions, more than {limits.dims}"
        raise BadFile(name, "st_too_many_dims", detail)
    if any(size > limits.dim for size in shape):
        raise BadFile(name, "st_dim_too_large", f"{shown(key)} has a dimension of {max(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadFile(name, "st_bad_offsets", f"{shown(key)} has no pair [begin, end] of offsets")
    begin, end = offsets
    if end > data_bytes:
        detail = f"{shown(key)} ends at byte {end} of {data_bytes}: the file is cut off"
        raise BadFile(name, "st_truncated", detail)
    n_bits = _product(shape) * bits
    if n_bits % 8:
        raise BadFile(name, "st_sub_byte", f"{shown(key)} ends inside a byte")
    if n_bits != (end - begin) * 8:
        detail = f"{shown(key)} is {dtype}{list(shape)}, which is {n_bits // 8} bytes and not "
        raise BadFile(name, "st_size_mismatch", detail + str(end - begin))
    return TensorInfo(dtype, tuple(shape), begin, end)


_FIELDS = {"dtype", "shape", "data_offsets"}


def _refuse_fields(key: str, entry: dict[str, Any], name: str) -> NoReturn:
    unknown = sorted(entry.keys() - _FIELDS)
    if unknown:
        detail = f"the entry of {shown(key)} has the unknown field {shown(unknown[0])}"
        raise BadFile(name, "st_unknown_field", detail)
    missing = min(_FIELDS - entry.keys())
    raise BadFile(name, "st_missing_field", f"the entry of {shown(key)} has no {missing}")


def _check_contiguous(found: Iterable[tuple[str, TensorInfo]], data_bytes: int, name: str) -> None:
    """Every byte of the data region belongs to exactly one tensor."""
    at = 0
    for key, info in found:
        if info.begin < at:
            raise BadFile(name, "st_overlap", f"{shown(key)} overlaps the tensor before it")
        if info.begin > at:
            raise BadFile(name, "st_gap", f"{info.begin - at} bytes before {shown(key)} are unused")
        at = info.end
    if at != data_bytes:
        detail = f"{data_bytes - at} bytes follow the last tensor"
        raise BadFile(name, "st_trailing_bytes", detail)


def _are_counts(value: Any) -> bool:
    # `type is int` because True is an int and 2.0 equals one.
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _product(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _utf8_length(text: str, name: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        detail = f"{shown(text)} holds half of a surrogate pair"
        raise BadFile(name, "st_lone_surrogate", detail) from error


def shown(text: str, limit: int = 80) -> str:
    """`text` from a file as one printable, bounded, quoted piece of a message."""
    cut = text if len(text) <= limit else text[:limit] + "…"
    return "'" + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in cut) + "'"


# Read as a length each of them is far above any limit.
_MAGIC = (
    (b"PK\x03\x04", "a zip, perhaps a PyTorch pickle (.ckpt, .pt, .bin)"),
    *((bytes((0x80, protocol)), "a Python pickle (.ckpt, .pt, .bin)") for protocol in range(2, 6)),
    (b"GGUF", "a GGUF file"),
    (b"\x89PNG", "a PNG image, perhaps of an embedding"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"version ", "a Git LFS pointer, which stands for the file itself"),
    (b"<!DOCTYP", "a web page, perhaps of a failed download"),
    (b"<!doctyp", "a web page, perhaps of a failed download"),
    (b"<html", "a web page, perhaps of a failed download"),
    (b'{"', "a JSON document"),
    (b"{\n", "a JSON document"),
)
