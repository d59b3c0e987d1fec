"""Hashes against plain definitions, and the window that must never be the hash of nothing."""

import hashlib
import zlib
from pathlib import Path

import pytest
from blake3 import blake3

from merge.errors import BadFile
from merge.formats.hashes import hash_file

MIB = 2**20


@pytest.mark.parametrize("size", [100, MIB, MIB + 1, MIB + 65536, 5 * MIB + 17, 13 * MIB])
def test_hashes_are_their_definitions(size: int, tmp_path: Path) -> None:
    data = b"".join(i.to_bytes(4, "little") for i in range(size // 4 + 1))[:size]
    path = tmp_path / "f"
    path.write_bytes(data)
    hashes = hash_file(path, 60)
    window = data[MIB : MIB + 65536]
    assert hashes.to_json() == {
        "sha256": hashlib.sha256(data).hexdigest(),
        "autov1": hashlib.sha256(window).hexdigest()[:8] if window else None,
        "autov2": hashlib.sha256(data).hexdigest()[:10],
        "autov3": hashlib.sha256(data[60:]).hexdigest()[:12],
        "blake3": blake3(data).hexdigest(),
        "crc32": f"{zlib.crc32(data):08x}",
    }


def test_the_data_may_begin_in_any_chunk(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000
    path = tmp_path / "f"
    path.write_bytes(data)
    for offset in (8, 4 * MIB, 4 * MIB + 3, len(data)):
        assert hash_file(path, offset).data_sha256 == hashlib.sha256(data[offset:]).hexdigest()


def test_crc32_of_a_known_text(tmp_path: Path) -> None:
    # Civitai prints 85114A0D for it: the same bytes reversed.
    (tmp_path / "f").write_bytes(b"hello world")
    assert hash_file(tmp_path / "f", 0).crc32 == "0d4a1185"


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="f: No such file"):
        hash_file(tmp_path / "f", 0)
