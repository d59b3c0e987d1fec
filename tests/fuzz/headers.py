"""Bytes of any kind as a safetensors file, see `tests/fuzz/__main__.py`.

The first byte says whether the length of the header is the fuzzer's or the right one for the text
up to the last `}`. We answer or raise BadFile, and what we accept the library accepts and reads alike.
"""

import struct

import atheris

with atheris.instrument_imports(include=["merge.formats.header"]):
    from merge.errors import BadFile
    from merge.formats.header import Limits, parse_header

from safetensors import SafetensorError, deserialize

from tests.fixtures.malformed import MALFORMED, ODD

# Small, so that the fuzzer reaches what lies behind them.
LIMITS = Limits(header_bytes=4096, tensors=50, metadata_keys=20, metadata_bytes=1000)


def seeds() -> list[bytes]:
    """Files that keep every rule, and short ones that break one."""
    broken = [case.make() for case in MALFORMED if case.name not in _LONG]
    files = [make() for make in ODD.values()] + [data for data in broken if len(data) < 1000]
    return [b"\0" + data for data in files] + [b"\1" + data[8:] for data in files]


_LONG = {case.name for case in MALFORMED if "0,000" in case.name or "flood" in case.name}


def one_input(data: bytes) -> None:
    """What `data` does is a BadFile, or a header that agrees with the library's."""
    framed, data = data[:1] == b"\1", data[1:]
    if framed:
        data = struct.pack("<Q", data.rfind(b"}") + 1) + data
    try:
        header = parse_header(data, len(data), "fuzz", limits=LIMITS)
    except BadFile:
        return
    try:
        found = dict(deserialize(data))
    except SafetensorError as error:
        raise AssertionError(f"we accept what the library refuses: {error}") from error
    assert found.keys() == header.tensors.keys()
    for key, info in header.tensors.items():
        assert tuple(found[key]["shape"]) == info.shape
        begin = header.data_offset + info.begin
        assert bytes(found[key]["data"]) == data[begin : begin + info.size_bytes]
