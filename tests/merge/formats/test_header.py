"""Headers: every rule refuses with its own reason, and what we accept the library accepts too."""

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from merge.errors import BadFile
from merge.formats.header import Limits, parse_header, read_header
from tests.fixtures.malformed import MALFORMED, ODD, Malformed, entry, frame


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.name)
def test_a_malformed_file_is_refused_with_its_reason(case: Malformed, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    with pytest.raises(BadFile) as caught:
        read_header(path)
    assert caught.value.reason == case.reason
    message = str(caught.value)
    assert message.startswith("file.safetensors: ")
    assert message.isprintable()
    assert len(message) < 300


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pickle", "a Python pickle"),
        ("pickle, protocol 5", "a Python pickle"),
        ("zip", "a zip, perhaps a PyTorch pickle"),
        ("GGUF", "a GGUF file"),
        ("PNG", "a PNG image"),
        ("JPEG", "a JPEG image"),
        ("Git LFS pointer", "a Git LFS pointer"),
        ("web page", "a web page"),
        ("JSON", "a JSON document"),
    ],
)
def test_files_of_other_formats_are_called_by_name(name: str, what: str, tmp_path: Path) -> None:
    by_name = {case.name: case for case in MALFORMED}
    with pytest.raises(BadFile, match=f"it is {what}"):
        read_header(by_name[name].write(tmp_path))


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_read_as_the_library_reads_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(ODD[name]())
    header = read_header(path)
    with safe_open(path, framework="numpy") as library:
        assert set(header.tensors) == set(library.keys())
        assert dict(header.metadata) == (library.metadata() or {})
        for key, info in header.tensors.items():
            view = library.get_slice(key)
            assert (info.dtype, list(info.shape)) == (view.get_dtype(), view.get_shape())


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="nothing.safetensors: No such file"):
        read_header(tmp_path / "nothing.safetensors")


def test_tensors_come_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(ODD["out of order"]())
    assert list(read_header(path).tensors) == ["a", "b"]


def test_leading_blanks_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(ODD["leading blanks"]())
    assert read_header(path).leading_spaces == 2


def test_limits_can_be_set() -> None:
    data = frame({"a": entry(), "b": entry(offsets=(16, 32))}, bytes(32))
    assert len(parse_header(data, len(data), "f", limits=Limits(tensors=2)).tensors) == 2
    with pytest.raises(BadFile, match="st_too_many_tensors"):
        parse_header(data, len(data), "f", limits=Limits(tensors=1))


def test_an_absurd_length_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(frame("{}", length=15 * 2**20))
    tracemalloc.start()
    with pytest.raises(BadFile, match="st_header_beyond_file"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_flood_of_brackets_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    flood = frame('{"a":[' + ",".join(["[]"] * 2_000_000) + "]}")
    tracemalloc.start()
    with pytest.raises(BadFile, match="st_too_many_tensors"):
        parse_header(flood, len(flood), "f")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(flood)  # two million lists would be 120 MB and more


def test_ranged_reads_need_only_the_head() -> None:
    data = frame({"a": entry()}, bytes(16))
    head = data[:-16]
    assert parse_header(head, len(data), "f") == parse_header(data, len(data), "f")
    with pytest.raises(BadFile, match="st_short_read"):
        parse_header(head[:-1], len(data), "f")


_DTYPES = st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "F4", "X"])
_SIZES = st.integers(-1, 5)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
_ENTRIES = (
    st.builds(
        entry,
        _DTYPES,
        st.lists(_SIZES, max_size=3),
        st.tuples(st.integers(-1, 48), st.integers(0, 48)),
    )
    | _JSON
)
_HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "c", "__metadata__"]) | st.text(max_size=3), _ENTRIES, max_size=3
)
_NEAR = st.integers(0, 200)


@settings(max_examples=300, deadline=None)
@given(header=_HEADERS, data=st.binary(max_size=48))
@example(header={"a": entry()}, data=bytes(16))
def test_what_we_accept_the_library_accepts(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, object], data: bytes
) -> None:
    _compare_with_the_library(tmp_path_factory.getbasetemp() / "fuzz", frame(header, data))


@settings(max_examples=500, deadline=None)
@given(
    case=st.sampled_from([*ODD]),
    edits=st.lists(st.tuples(_NEAR, st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 4),
)
def test_a_file_with_flipped_bytes_never_surprises(
    tmp_path_factory: pytest.TempPathFactory, case: str, edits: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(ODD[case]())
    for at, value in edits:
        data[at % len(data)] = value
    _compare_with_the_library(
        tmp_path_factory.getbasetemp() / "fuzz", bytes(data[: len(data) - cut])
    )


def _compare_with_the_library(path: Path, data: bytes) -> None:
    """We answer or raise BadFile; whatever we accept, the library accepts and reads alike."""
    try:
        header = parse_header(data, len(data), "fuzz")
    except BadFile:
        return
    path.write_bytes(data)
    try:
        with safe_open(path, framework="numpy") as library:
            assert set(library.keys()) == set(header.tensors)
            assert (library.metadata() or {}) == dict(header.metadata)
    except SafetensorError as error:
        pytest.fail(f"we accept what the library refuses: {error}; {data!r}")


def test_the_header_of_a_real_writer_is_read(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    path = tmp_path / "real.safetensors"
    metadata = {"ss_network_dim": "8", "note": 'größe "猫"'}
    save_file({"x": np.zeros((2, 3), np.float16), "y": np.zeros(5)}, path, metadata)
    header = read_header(path)
    assert dict(header.metadata) == metadata
    assert {k: (v.dtype, v.shape, v.size_bytes) for k, v in header.tensors.items()} == {
        "x": ("F16", (2, 3), 12),
        "y": ("F64", (5,), 40),
    }
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert header.data_offset == 8 + size
    assert json.loads(path.read_bytes()[8 : 8 + size])["x"]["shape"] == [2, 3]
