"""The Range header: one byte range, or the whole file."""

import re

_BYTES = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


class RangeNotSatisfiable(Exception):
    """The range starts past the end of the file; answered with 416."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the range starts past the end; the file has {size} bytes")
        self.size = size


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The half-open range [start, end) that is asked for, or None for the whole file.

    Several ranges, other units and malformed headers get the whole file, as RFC 9110 14.2 allows.
    """
    found = _BYTES.fullmatch(header.strip()) if header and len(header) <= 64 else None
    if found is None or found[0] == "bytes=-":
        return None
    first, last = found[1], found[2]
    if not first:
        start, end = max(0, size - int(last)), size
        if not int(last) or not size:
            raise RangeNotSatisfiable(size)
        return start, end
    start = int(first)
    end = min(int(last) + 1, size) if last else size
    if last and int(last) < start:
        return None
    if start >= size:
        raise RangeNotSatisfiable(size)
    return start, end
