"""`python -m hub.reports.child`: measure recipes, one after another, in a process of its own.

It never opens the database or the blob store.
Its first line on stdin is a JSON `Setup`, every further line an `Order`; at the end of stdin it ends.
On stdout it answers each order with one line: `{"report": {...}}` or `{"error": {...}}`.
Whatever else is printed goes to stderr.
"""

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from hub.jobs.child import described, is_allocation_failure
from hub.jobs.confine import be_modest, die_with_parent, limit_files, limit_memory
from hub.jobs.scratch import Input, lay_out
from merge.errors import MergeError
from merge.recipe import Recipe

_NO_FILES_BYTES = 2**20


class Setup(BaseModel):
    """What holds for every order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parent: int
    memory_bytes: int
    niceness: int = 5


class Order(BaseModel):
    """One recipe to measure, and the files that it names; `folder` is made and belongs to it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    inputs: list[Input]
    folder: Path


def main() -> None:
    """Answer until there is nobody to answer."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # a library that prints must not speak in the protocol's place
    setup = Setup.model_validate_json(sys.stdin.buffer.readline())
    die_with_parent(setup.parent)
    be_modest(setup.niceness)
    limit_files(_NO_FILES_BYTES)
    orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    # Imported before the memory limit is set: the limit is for the work, not for torch itself.
    import merge.reports.measure  # noqa: F401

    limit_memory(setup.memory_bytes)
    while True:
        answer = _answer(Order.model_validate_json(orders.get()), setup.memory_bytes)
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


def _listen(orders: "queue.SimpleQueue[bytes]") -> None:
    # In a thread, so that the end of the parent ends this process in the middle of its work too.
    for line in sys.stdin.buffer:
        orders.put(line)
    os._exit(0)


def _answer(order: Order, memory_bytes: int) -> dict[str, Any]:
    from merge.reports.measure import measure

    try:
        files = lay_out(order.folder, order.inputs)
        return {"report": measure(Recipe.load(order.recipe), files).to_json()}
    except MergeError as error:
        return {"error": described(error)}
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_allocation_failure(error):
            raise
        message = f"the report needs more memory than the {memory_bytes:,} bytes it may take"
        return {"error": {"code": "TooLarge", "message": message, "param": None}}


if __name__ == "__main__":
    main()
