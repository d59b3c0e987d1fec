"""From a recipe to a report: resolved as a job would be, planned, measured or remembered."""

import asyncio
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool

from hub.context import Hub
from hub.errors import Busy, Invalid, TooLarge
from hub.jobs import inputs
from hub.jobs.inputs import Resolved
from hub.jobs.service import plan_on
from hub.reports.pool import Pool, Task
from hub.users.service import Viewer
from merge.errors import BadRecipe
from merge.recipe import Recipe

MAX_INPUTS = 32
_REMEMBERED_BYTES = 32 * 2**20
_LOOK_EVERY_S = 0.25


class NotMeasurable(Invalid):
    """What the engine refused only when it read the tensors; `code` is the engine's."""

    def __init__(self, code: str, message: str, param: str | None) -> None:
        super().__init__(message, param)
        self._code = code

    @property
    def code(self) -> str:
        return self._code


@dataclass(frozen=True, slots=True)
class Wanted:
    """A recipe that can be measured, with what its sources are on this hub."""

    recipe: Recipe
    resolved: Sequence[Resolved]

    @property
    def key(self) -> str:
        """Of the same answer: the recipe's digest has no names, but a report does."""
        files = [(item.ref, item.main) for item in self.resolved]
        text = json.dumps([self.recipe.model_dump(mode="json"), files])
        return hashlib.sha256(text.encode()).hexdigest()


class Reports:
    """The reports of one web process: those being made, and the latest that were."""

    def __init__(self, pool: Pool, remembered_bytes: int = _REMEMBERED_BYTES) -> None:
        self.pool = pool
        self._room = remembered_bytes
        self._lock = threading.Lock()
        self._remembered: OrderedDict[str, bytes] = OrderedDict()

    async def measure(self, wanted: Wanted, is_gone: Callable[[], Awaitable[bool]]) -> bytes:
        """The report as JSON. TooLarge, NotMeasurable; Busy, also once `is_gone` says so."""
        key = wanted.key
        known = self._recall(key)
        if known is not None:
            return known
        task = self.pool.submit(wanted.recipe, wanted.resolved)
        message = await _message(task, is_gone)
        if "error" in message:
            raise _refusal(**message["error"])
        report = message["report"] | {"recipe_digest": wanted.recipe.digest()}
        text = await run_in_threadpool(lambda: json.dumps(report).encode())
        self._remember(key, text)
        return text

    def _recall(self, key: str) -> bytes | None:
        with self._lock:
            if key in self._remembered:
                self._remembered.move_to_end(key)
            return self._remembered.get(key)

    def _remember(self, key: str, text: bytes) -> None:
        with self._lock:
            self._remembered[key] = text
            while sum(map(len, self._remembered.values())) > self._room:
                self._remembered.popitem(last=False)


def prepare(hub: Hub, viewer: Viewer, document: dict[str, Any]) -> Wanted:
    """Check a recipe as a job's is checked; BadRecipe and the other MergeErrors say what is wrong."""
    recipe = Recipe.parse(document)
    if recipe.kind == "extract":
        raise BadRecipe("kind", "is extract, but a report is on adapters that are combined")
    if len(recipe.inputs) > MAX_INPUTS:
        raise BadRecipe("inputs", f"a report takes at most {MAX_INPUTS} adapters")
    with hub.db.read() as session:
        resolved = inputs.resolve(session, hub.store, viewer, recipe)
    recipe = inputs.pin(recipe, resolved)
    plan_on(hub, recipe, resolved)
    return Wanted(recipe, resolved)


async def _message(task: Task, is_gone: Callable[[], Awaitable[bool]]) -> dict[str, Any]:
    future = asyncio.wrap_future(task.future)
    try:
        while not (await asyncio.wait({future}, timeout=_LOOK_EVERY_S))[0]:
            if await is_gone():
                raise Busy("the report was given up")
    except BaseException:
        task.gone.set()
        future.cancel()
        raise
    return future.result()


def _refusal(code: str, message: str, param: str | None) -> Invalid | TooLarge:
    if code == TooLarge.__name__:
        return TooLarge(message, "recipe")
    return NotMeasurable(code, message, param)
