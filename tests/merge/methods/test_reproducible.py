"""The same numbers from any number of threads, and in another process."""

import hashlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge.method_parameters import Parameters
from merge.methods import elements
from merge.methods.elements import Dense, tiles
from merge.methods.rounds import Round
from tests.merge.methods.adapters import adapters
from tests.merge.methods.changes import random_changes
from tests.merge.methods.test_aligned import METHODS as ALIGNED
from tests.merge.methods.test_aligned import merged as merged_in_core
from tests.merge.methods.test_elementwise import CASES, merge

ELEMENTWISE = [parameters for parameters, _ in CASES]


@pytest.mark.parametrize("parameters", ELEMENTWISE, ids=repr)
def test_threads_that_ask_for_different_rows_get_the_same_numbers(
    parameters: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elements, "TILE_ELEMENTS", 20_000)
    shape = (900, 500)  # many tiles, and more elements than are collected at once
    changes = random_changes(shape, 3)
    alone = merge(parameters, changes).rows(0, shape[0])
    shared, start = merge(parameters, changes), threading.Barrier(4)

    def ask(thread: int) -> Tensor:
        start.wait()
        pieces = {first: shared.rows(first, rows) for first, rows in _order(shape, thread)}
        return torch.cat([pieces[first] for first in sorted(pieces)])

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(ask, range(4)):
            assert torch.equal(found, alone)


def _order(shape: tuple[int, int], thread: int) -> list[tuple[int, int]]:
    """Tiles from another one on for each thread, and rows that are no tiles for one of them."""
    if thread == 3:
        return [(first, min(77, shape[0] - first)) for first in range(0, shape[0], 77)]
    found = list(tiles(shape))
    return found[7 * thread :] + found[: 7 * thread]


def test_every_part_of_a_round_is_done_once_before_any_thread_goes_on() -> None:
    done: list[int] = []
    work, start = Round(range(500), done.append), threading.Barrier(4)

    def ask(_: int) -> int:
        start.wait()
        work.finish()
        return len(done)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [500] * 4
    assert sorted(done) == list(range(500))


def test_what_fails_in_one_thread_is_raised_in_all_and_again() -> None:
    begun = threading.Barrier(2)

    def fail(part: int) -> None:
        if part < 2:
            begun.wait(timeout=10)  # both threads have a part
        if part == 0:
            raise MemoryError("no room")

    work = Round(range(9), fail)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work.finish) for _ in range(2)]
        for future in futures:
            with pytest.raises(MemoryError, match="no room"):
                future.result(timeout=10)
    with pytest.raises(MemoryError, match="no room"):
        work.finish()


def test_a_change_that_fails_fails_the_result_in_every_thread() -> None:
    class Broken(Dense):
        def rows(self, first: int, count: int) -> Tensor:
            if first > 500:
                raise MemoryError("no room")
            return super().rows(first, count)

    merged = merge(ELEMENTWISE[0], [Broken(torch.ones(900, 500))])
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(merged.rows, 0, 1) for _ in range(2)]:
            with pytest.raises(MemoryError, match="no room"):
                future.result(timeout=10)


def digest() -> str:
    """Of what every method makes of the same adapters."""
    found = hashlib.sha256()
    for parameters in ELEMENTWISE:
        changes = random_changes((300, 1000), 3)
        found.update(merge(parameters, changes).rows(0, 300).numpy().tobytes())
    for parameters in ALIGNED:
        found.update(merged_in_core(parameters, adapters(40, 50, (4, 7, 3))).tobytes())
    return found.hexdigest()


def test_another_process_makes_the_same_bytes() -> None:
    code = f"from {__name__} import digest; print(digest())"
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=environment,
        cwd=root,
        text=True,
        capture_output=True,
    )
    assert other.stdout.strip() == digest(), other.stderr
