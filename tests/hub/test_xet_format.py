"""The bytes of Xet: hashes, xorbs, shards, and what a hostile client makes of them."""

import io
import tracemalloc
from collections.abc import Callable

import hf_xet
import lz4.frame
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.errors import BadUpload
from hub.xet.hashes import Tree, XetHash, chunk_hash, file_hash, to_text
from hub.xet.shards import ShardFile, read_shard
from hub.xet.xorbs import MAX_CHUNK_BYTES, MAX_CHUNKS, ChunkIndex, ChunkReader, XorbCheck
from tests.fixtures import xet
from tests.fixtures.xet import damages

BLOCK = b"The same words again and again. " * 300


def check(data: bytes, name: str, step: int = 1000) -> ChunkIndex:
    checked = XorbCheck()
    for start in range(0, len(data), step):
        checked.feed(data[start : start + step])
    checked.finish(XetHash(name))
    return checked.index


def read(data: bytes, step: int) -> list[bytes]:
    reader = ChunkReader()
    chunks = [
        chunk
        for start in range(0, len(data), step)
        for chunk in reader.feed(data[start : start + step])
    ]
    reader.finish()
    return chunks


def shard_files(data: bytes) -> list[ShardFile]:
    return list(read_shard(io.BytesIO(data)))


# Hashes


def seeded(text: str) -> bytes:
    return xet.swapped(bytes.fromhex(text))


# The first eight of xet-core's `MerkleHash::random_from_seed(1…)`, and roots over rows of them that
# its `aggregated_hashes::test_correctness` lists (github.com/huggingface/xet-core, af1a3ff).
SEEDED = {
    0: "0000000000000000000000000000000000000000000000000000000000000000",
    1: "cfc5d07f6f03c29bbf424132963fe08d19a37d5757aaf520bf08119f05cd56d6",
    2: "c3e67584b5c4fc2a89837ec39e40f2c8a6bb0b2987ac94cd4b31e5fbdd210a72",
    3: "0d2beb91b9196929a5ddec9f6e306924ddf4a24268e3e59fd8464738d525af37",
    4: "adf8773496a9b7319b2e50dc98093f344053b17d8ad37100b9c07d9805988784",
    5: "4ac202caf347fc1e9c874b1ef6a1c5e619141eb775a6f43f0f0124ccd0060d9e",
    6: "b3b28636f65c149ea52eb1f94669466f70f033b54cea792824c696ba6ef3c389",
    7: "0e2c1a002aae913d2c0fc8ddfa4e9e14b7b311b3b0d458726d5d9f6a6318013c",
}
ROOTS = [
    (
        [1, 2, 3],
        "71ec1275fca074724e2dd666921b3277c7cee603e4d025bcab2d4050015be2bc",
        "54e55dccc6653c612bdb5576c5d3cb34bb31bc4e100248abccf4c908b3ef7715",
    ),
    (
        [1, 2, 1, 2, 3, 4],
        "52c826f99507aa05d0b45e9837fa1709e0485425cfbcb1e80db3905cf98b3ee9",
        "91d21684db364c8883ab8209fa5eb2e781cf07f37e1fa43e731c30839afe422f",
    ),
    (
        list(range(8)),
        "f62abe77e3fb9c954fe52b0028027ddc90c064c45951a4fd2211d87e5c0011db",
        "d1b068be5bbdb38992269e8efe61f601881e39f7a7585fd76883cc6ea5c23b44",
    ),
    (
        list(range(8)) * 8,
        "6554007c9b5d0a5e7918f79596a1b68815c1407535585435f5735db761f21b88",
        "a8640ab81d48854e00078e12b1ea8be5d90be0ffb5f73a15b7009981d093ddd8",
    ),
    (
        [1] * 32,
        "0a0123c1617921883b7e13902095fcb86676e77c49120c33b233003b0af0e0a6",
        "53af4711fd1d5e5bdc7f931b6be932314d8d673cb16ad2482f6f5222eaf9e63d",
    ),
    (
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7],
        "636c65db520ec16e8166f9ec7a0cf9f74b26369077ac60160ec0221c86bc9f77",
        "6a90ad0d6f5246ac61f1de898c6944c03e14004a1368e6fb23387108c4d039e0",
    ),
]


@pytest.mark.parametrize(("row", "xorb", "file"), ROOTS, ids=[str(len(row)) for row, *_ in ROOTS])
def test_roots_are_those_of_the_reference_implementation(
    row: list[int], xorb: str, file: str
) -> None:
    tree = Tree()
    for n in row:
        tree.add(seeded(SEEDED[n]), 100 * n)
    root = tree.root()
    assert (to_text(root), to_text(file_hash(root))) == (xorb, file)


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=8), max_size=300))
def test_a_tree_that_grows_has_the_root_of_one_made_level_by_level(chunks: list[bytes]) -> None:
    tree, hashes = Tree(), xet.chunk_hashes(chunks)
    for digest, chunk in zip(hashes, chunks, strict=True):
        tree.add(digest, len(chunk))
    sized = [(digest, len(chunk)) for digest, chunk in zip(hashes, chunks, strict=True)]
    assert tree.root() == xet.merkle_root(sized)


def test_a_file_of_one_chunk_has_the_hash_that_clients_give_it(tmp_path: object) -> None:
    path = f"{tmp_path}/small"
    with open(path, "wb") as file:
        file.write(BLOCK[:5000])
    theirs = hf_xet.hash_files([path])[0].hash
    assert to_text(file_hash(chunk_hash(BLOCK[:5000]))) == theirs


# Xorbs


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=300).map(lambda b: b * 19), min_size=1, max_size=12),
    st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=3),
    st.integers(1, 5000),
)
def test_chunks_come_out_as_they_went_in(
    chunks: list[bytes], schemes: list[int], step: int
) -> None:
    made = xet.make_xorb(chunks, tuple(schemes))
    assert read(made.data, step) == chunks
    index = check(made.data, made.name, step)
    assert index.n_chunks == len(chunks)
    total = sum(map(len, chunks))
    assert (index.ends(0), index.ends(len(chunks))) == ((0, 0), (len(made.data), total))


def test_a_footer_is_passed_over() -> None:
    made = xet.make_xorb([BLOCK, BLOCK[1:]])
    with_footer = made.data + b"XETBLOB\1" + bytes(5000)
    for step in (1, 7, 4096):
        assert check(with_footer, made.name, step).ends(2)[0] == len(made.data)


def bomb(raw: int) -> bytes:
    body = lz4.frame.compress(bytes(raw))
    return xet.chunk_header(1, len(body), MAX_CHUNK_BYTES) + body


def shortened(data: bytes, by: int) -> bytes:
    return xet.chunk_header(1, len(data) - 8 - by, len(BLOCK)) + data[8:-by]


GOOD = xet.stored_chunk(BLOCK, 1)


NOT_XORBS = [
    (b"", "no chunks"),
    (b"XETBLOB\1" + bytes(100), "no chunks"),
    (GOOD[:5], "cut short"),
    (GOOD[:-1], "cut short"),
    (GOOD + GOOD[:20], f"chunk at byte {len(GOOD)} of the xorb is cut short"),
    (xet.chunk_header(0, 3, 3, version=1) + b"abc", "version 1"),
    (xet.chunk_header(3, 3, 3) + b"abc", "compression scheme 3"),
    (xet.chunk_header(99, 3, 3) + b"abc", "compression scheme 99"),
    (xet.chunk_header(0, 0, 0), "holds 0 bytes"),
    (xet.chunk_header(0, 2**17 + 1, 2**17 + 1), "holds 131073 bytes"),
    (xet.chunk_header(1, 2**18 + 1, 2**17), "stores 131072 bytes in 262145"),
    (xet.chunk_header(0, 4, 3) + b"abcd", "stores 3 bytes in 4"),
    (xet.chunk_header(1, 30, 50) + b"these are no LZ4 frames at all", "no LZ4 frame"),
    (shortened(GOOD, 4), "does not unpack to its"),
    (xet.chunk_header(1, len(GOOD) - 8, len(BLOCK) + 1) + GOOD[8:], "does not unpack to its"),
    (xet.chunk_header(1, len(GOOD) - 8, len(BLOCK) - 1) + GOOD[8:], "does not unpack to its"),
    (xet.chunk_header(1, len(GOOD) - 7, len(BLOCK)) + GOOD[8:] + b"x", "does not unpack to"),
    (bomb(2**17 + 1), "does not unpack to its 131072 bytes"),
    (bomb(200 * 2**20), "stores 131072 bytes in"),
    (xet.stored_chunk(b"x") * (MAX_CHUNKS + 1), f"more than {MAX_CHUNKS} chunks"),
    (GOOD, "hash is"),
]


@pytest.mark.parametrize(
    ("data", "message"), NOT_XORBS, ids=[str(n) for n in range(len(NOT_XORBS))]
)
def test_a_xorb_that_is_not_right_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadUpload, match=message):
        check(data, "0" * 64, step=4096)


def test_a_frame_that_unpacks_to_more_takes_no_memory_for_it() -> None:
    body = lz4.frame.compress(bytes(60 * 2**20))
    data = xet.chunk_header(1, len(body), MAX_CHUNK_BYTES) + body
    assert len(body) < 2 * MAX_CHUNK_BYTES
    tracemalloc.start()
    try:
        with pytest.raises(BadUpload, match="does not unpack"):
            check(data, "0" * 64)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_xorb_is_refused_and_never_anything_else(data: st.DataObject) -> None:
    made = xet.make_xorb([BLOCK[:n] for n in (4000, 9000, 5000, 1)])
    damaged = data.draw(damages(made.data))
    try:
        check(damaged, made.name)
    except BadUpload:
        return
    # Only the chunks matter: a footer may follow, and LZ4 has more than one spelling.
    assert read(damaged, 1000) == made.chunks


# Shards


def a_shard(**changes: bytes) -> bytes:
    xorb = xet.make_xorb([BLOCK[:n] for n in (4000, 9000, 5000)])
    return xet.make_shard([xet.file_block([(xorb, 0, 3), (xorb, 1, 2)])], [xorb])


def test_a_shard_tells_of_its_files() -> None:
    xorb = xet.make_xorb([b"a" * 10, b"b" * 20])
    plain = xet.file_block([(xorb, 0, 1)], flags=0)
    whole = xet.file_block([(xorb, 0, 2), (xorb, 1, 2)], sha256=bytes(range(32)))
    first, second, empty = shard_files(
        xet.make_shard([plain, whole, xet.file_block([])], [xorb, xorb])
    )
    (term,) = first.terms()
    assert (term.xorb, term.size, term.start, term.end) == (xorb.name, 10, 0, 1)
    assert (first.sha256, term.proof) == (None, None)
    assert second.sha256 == bytes(range(32)).hex()
    assert [(t.start, t.end, t.size, len(t.proof or b"")) for t in second.terms()] == [
        (0, 2, 30, 32),
        (1, 2, 20, 32),
    ]
    assert list(empty.terms()) == []


SHARD = a_shard()
CHANGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda s: b"", "cut short in its header"),
    "another file": (lambda s: b"x" * 200, "no shard"),
    "an older version": (lambda s: s[:32] + b"\1" + s[33:], "version 1"),
    "no end": (lambda s: s[:-48], "cut short in its xorbs"),
    "half a record": (lambda s: s[:-1], "cut short in its xorbs"),
    "more after the end": (lambda s: s + b"x", "1 bytes follow the end"),
    "unknown flags": (lambda s: s[:80] + b"\1" + s[81:], "unknown flags"),
    "four milliards of terms": (lambda s: s[:84] + b"\xff" * 4 + s[88:], "in a file's terms"),
    "one term too many": (lambda s: s[:84] + b"\3" + s[85:], "in "),
    "only files": (lambda s: s[:150], "in a file's terms"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_is_not_right_is_refused(change: str) -> None:
    make, message = CHANGES[change]
    with pytest.raises(BadUpload, match=message):
        shard_files(make(SHARD))


@settings(max_examples=300, deadline=None)
@given(damages(SHARD))
def test_a_damaged_shard_is_read_or_refused_and_never_anything_else(damaged: bytes) -> None:
    try:
        files = shard_files(damaged)
    except BadUpload:
        return
    assert sum(len(list(file.terms())) for file in files) <= len(damaged) // 48
