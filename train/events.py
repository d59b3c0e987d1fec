"""What happens in a run: one JSON line per event in events.jsonl, and a callback for whoever watches.

event        fields besides `event` and `time`
start        name, base, trainable, total, modules, examples, steps, from_step, device, precision,
             trigger_tokens
phase        what: preparing or finishing work that takes more than a moment
note         message: something about the data the user should know
image        name, caption: every image with the caption that is used
step         step, steps, loss, learning_rate, eta_s
checkpoint   step, path
sample       step, path, prompt, seed
sample_failed  step, detail
scores       the numbers of metrics.json
finish       path, seconds
failed       error, message
"""

import json
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merge.errors import CannotWrite

Event = dict[str, Any]
Listener = Callable[[Event], None]

RECENT_STEPS = 50


class EventLog:
    """Appends to the file and passes each event on; a resumed run continues the same file."""

    def __init__(self, path: Path, listener: Listener | None) -> None:
        self.path = path
        self._listener = listener

    def emit(self, event: str, **fields: Any) -> None:
        line: Event = {"event": event, "time": round(time.time(), 3), **fields}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise CannotWrite(self.path.name, error.strerror or str(error)) from error
        if self._listener is not None:
            self._listener(line)


class Clock:
    """Seconds to go, from the median of recent steps: the first slow step does not count for long."""

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=RECENT_STEPS)
        self._started = 0.0

    def start(self) -> None:
        self._started = time.monotonic()

    def stop(self) -> None:
        self._durations.append(time.monotonic() - self._started)

    def eta_s(self, steps_left: int) -> float:
        return round(statistics.median(self._durations) * steps_left, 1)
