"""Files appear whole or not at all, and the same tensors give the same bytes."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.errors import BadFile, CannotWrite
from merge.formats import positioned
from merge.formats.reader import TensorFile
from merge.formats.writer import FileWriter, layout, write_file

# Two tensors and two metadata keys, written out so that the format cannot drift unnoticed.
GOLDEN = (
    b"\x98\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"a":"1","format":"pt"},'
    b'"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"y":{"dtype":"F16","shape":[1,3],"data_offsets":[8,14]}}'
    b"   "
    b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    b"\x00\x3c\x00\xc0\x00\x00"
)
TWO = {
    "y": np.array([[1.0, -2.0, 0.0]], np.float16),
    "x": np.array([1.0, -2.0], np.float32),
}


def test_golden_bytes(tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    write_file(path, TWO, {"format": "pt", "a": "1"})
    assert path.read_bytes() == GOLDEN


def _every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = [
        *("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex64"),
        *("float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz"),
    ]
    tensors = {}
    for name in names:
        dtype = getattr(torch, name)
        data = torch.randint(0, 2, (3 * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        tensors[f"t.{name}"] = data.view(dtype).reshape(3, 1)
    return tensors | {"scalar": torch.tensor(4.0), "empty": torch.empty(0, 7)}


def test_write_file_gives_the_bytes_of_the_library(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_file(ours, _every_dtype(), {"format": "pt"})
    save_file(_every_dtype(), theirs, {"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes()


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    write_file(path, _every_dtype(), {})
    with TensorFile(path) as file:
        for key, tensor in _every_dtype().items():
            back = file.read_tensor(key)
            assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(
                back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
            )


def test_strided_big_endian_and_grad_tensors_are_written_by_value(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    matrix = torch.arange(6.0).reshape(2, 3)
    write_file(
        path,
        {
            "t": matrix.t(),
            "big": np.arange(3, dtype=">f4"),
            "strided": np.arange(6.0)[::2],
            "grad": torch.ones(2, requires_grad=True),
        },
        {},
    )
    back = load_file(path)
    assert back["t"].tolist() == matrix.t().tolist()
    assert back["big"].tolist() == [0, 1, 2]
    assert back["strided"].tolist() == [0, 2, 4]
    assert back["grad"].tolist() == [1, 1]


def test_scalars_are_read_without_a_tensor_library(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    write_file(
        path,
        {
            "bf16": torch.tensor(100.5, dtype=torch.bfloat16),
            "f16": torch.tensor([0.1], dtype=torch.float16),
            "i64": torch.tensor(-8),
            "bool": torch.tensor(True),
            "matrix": torch.ones(2, 2),
        },
        {},
    )
    with TensorFile(path) as file:
        assert file.read_scalar("bf16") == 100.5
        assert file.read_scalar("f16") == 0.0999755859375
        assert file.read_scalar("i64") == -8
        assert file.read_scalar("bool") == 1
        with pytest.raises(BadFile, match="matrix is F32.2, 2. and not one number"):
            file.read_scalar("matrix")


def test_the_writer_keeps_the_order_it_is_given() -> None:
    placed = layout([("b", "F16", (3,)), ("a", "F32", (2,))], {}).tensors
    assert [(key, info.begin, info.end) for key, info in placed.items()] == [
        ("b", 0, 6),
        ("a", 6, 14),
    ]


def test_tensors_may_be_written_in_pieces_by_several_threads(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    data = os.urandom(64 * 1024)
    with FileWriter(path, [("a", "U8", (len(data),)), ("b", "U8", (4,))], {}) as writer:

        def put(start: int) -> None:
            writer.write("a", data[start : start + 1024], start)

        threads = [threading.Thread(target=put, args=(i,)) for i in range(0, len(data), 1024)]
        for thread in threads:
            thread.start()
        writer.write("b", b"last")
        for thread in threads:
            thread.join()
    with TensorFile(path) as file:
        assert file.read("a") == data
        assert file.read("b") == b"last"
        part = bytearray(10)
        file.read_into("a", memoryview(part), 1000)
        assert part == data[1000:1010]
        with pytest.raises(IndexError):
            file.read_into("b", memoryview(part), 0)


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), FileWriter(path, [("a", "U8", (1,))], {}):
        _ = 1 / 0
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]


def test_a_forgotten_tensor_is_a_bug_that_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="2 bytes"),
        FileWriter(tmp_path / "f", [("a", "U8", (1,)), ("b", "F16", (1,))], {}) as writer,
    ):
        writer.write("a", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="f: No such file or directory; nothing was written"):
        write_file(tmp_path / "no" / "f", TWO, {})


def test_a_folder_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "f" / "full").mkdir(parents=True)
    with pytest.raises(CannotWrite, match="Is a directory"):
        write_file(tmp_path / "f", TWO, {})
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


_WRITE_5_MB = """
import sys
from pathlib import Path
import numpy as np
from merge.errors import CannotWrite
from merge.formats.writer import write_file
try:
    write_file(Path(sys.argv[1]), {k: np.ones(1_000_000, np.uint8) for k in "abcde"}, {})
except CannotWrite as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [0, 4, 1_500_000, 4_999_999])
def test_a_full_disk_leaves_nothing(limit: int, tmp_path: Path) -> None:
    """RLIMIT_FSIZE fails the same calls a full disk fails, with EFBIG for ENOSPC."""

    def limit_file_size() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    target = tmp_path / "f.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", _WRITE_5_MB, str(target)],
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "f.safetensors: File too large; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_failing_sync_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CannotWrite, match="No space left on device"):
        write_file(tmp_path / "f", TWO, {})
    assert list(tmp_path.iterdir()) == []


def test_data_is_on_disk_before_the_name_and_the_name_before_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(fd: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "data")
        fsync(fd)

    def watched_replace(source: Path, target: Path) -> None:
        calls.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_file(tmp_path / "f", TWO, {})
    assert calls == ["data", "name", "folder"]


def test_a_killed_writer_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    target = tmp_path / "f.safetensors"
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from merge.formats.writer import FileWriter\n"
        "with FileWriter(Path(sys.argv[1]), [('a', 'U8', (2,))], {}) as w:\n"
        "    w.write('a', b'x')\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()


def test_a_file_cut_while_it_is_read_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    write_file(path, {"a": np.ones(100_000), "b": np.ones(1)}, {})
    with TensorFile(path) as file:
        assert file.read_scalar("b") == 1
        os.truncate(path, 5000)
        with pytest.raises(BadFile, match="st_short_read"):
            file.read("a")


def test_the_portable_ways_do_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positioned, "_read_some", positioned._read_portably)
    monkeypatch.setattr(positioned, "_write_some", positioned._write_portably)
    test_golden_bytes(tmp_path)
    test_tensors_may_be_written_in_pieces_by_several_threads(tmp_path)


def test_calls_that_do_less_than_asked_are_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every system call may stop early; here each does at most three bytes."""
    read, write = positioned._read_some, positioned._write_some
    monkeypatch.setattr(positioned, "_read_some", lambda fd, b, o: read(fd, b[:3], o))
    monkeypatch.setattr(positioned, "_write_some", lambda fd, d, o: write(fd, d[:3], o))
    test_golden_bytes(tmp_path)
