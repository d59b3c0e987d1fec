"""Templates, their filters, and what every page knows."""

import json
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from hub.db import now
from hub.deps import hub_of, public_url, viewer
from hub.errors import Forbidden, HubError, TooManyTries, Unauthorized, status_of
from hub.jobs.schemas import JobProgress
from hub.users.service import Viewer
from hub.web import static_files

THEMES = ("light", "dark")
CARD_SIZES = ("compact", "normal", "large")


def page(
    request: Request, template: str, viewer: Viewer, *, status: int = 200, **context: Any
) -> HTMLResponse:
    """One whole page; it depends on who asks, so nobody may keep it for another."""
    cookies = request.cookies
    shared = {
        "theme": cookies.get("theme") if cookies.get("theme") in THEMES else None,
        "cards": cookies.get("cards") if cookies.get("cards") in CARD_SIZES else "normal",
        "user": viewer.user.name if viewer.user is not None else None,
        "is_admin": viewer.is_admin,
        "here": _here(request),
        "base_url": public_url(request),
        "room": None,
        "search_text": "",
    }
    html = _environment.get_template(template).render(shared | context)
    headers = {
        "Cache-Control": "private, no-cache",
        # With the stricter "no-referrer" browsers send a form's Origin as "null".
        "Referrer-Policy": "same-origin",
        "Vary": "Cookie",
    }
    return HTMLResponse(html, status, headers)


def refused_page(
    request: Request, template: str, viewer: Viewer, error: HubError | None, **context: Any
) -> HTMLResponse:
    """A form shown again with what was wrong; the template has a place for `problem`."""
    if error is None:
        return page(request, template, viewer, **context)
    answer = page(request, template, viewer, status=status_of(type(error)), **context)
    if isinstance(error, TooManyTries):
        answer.headers["Retry-After"] = str(error.retry_after_s)
    return answer


def see_other(place: str) -> Response:
    """After a form: a reload asks again and sends nothing again."""
    return RedirectResponse(place, 303)


def part(template: str, **context: Any) -> HTMLResponse:
    """What a page puts in its own place; it depends on who asks too."""
    html = _environment.get_template(template).render(context)
    return HTMLResponse(html, headers={"Cache-Control": "private, no-store"})


def viewer_of_page(request: Request) -> Viewer:
    """Who looks at an error page: a token or a form that is refused is nobody's."""
    try:
        return viewer(request, hub_of(request))
    except (Unauthorized, Forbidden):
        return Viewer()


def _here(request: Request) -> str:
    """Where to come back to; from the login page that is not the login page."""
    if request.url.path in ("/login", "/signup", "/invite"):
        return "/"
    if request.method not in ("GET", "HEAD"):
        # Where the form was; its own address may only be sent to.
        return local(urlsplit(request.headers.get("Referer", "")).path)
    query = request.url.query
    return request.url.path + (f"?{query}" if query else "")


def local(address: str) -> str:
    """An address of this hub, "/" for all others: nobody is sent elsewhere by a link to us.

    Browsers read "//host" and "/\\host" as another host, and drop control characters first.
    """
    is_path = address.startswith("/") and address[1:2] not in ("/", "\\")
    return address if is_path and address.isprintable() else "/"


def sentence(message: str) -> str:
    """A message of an error as people write one; a path or key that it begins with stays."""
    first = message.partition(" ")[0]
    start = message[:1].upper() if first.isalpha() else message[:1]
    return start + message[1:].rstrip(".") + "."


def size(n_bytes: int) -> str:
    """41.2 MB: decimal units, as download dialogs and shops count."""
    value = float(n_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if value >= 99.95 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def count(n: int) -> str:
    """1284 as 1.3k: for places where three figures say enough."""
    if n < 1000:
        return str(n)
    value, unit = (n / 1e3, "k") if n < 999_500 else (n / 1e6, "M")
    return f"{value:.0f}{unit}" if value >= 99.5 else f"{value:.1f}".removesuffix(".0") + unit


def percent(share: float) -> str:
    """Two or three figures, which is more than anybody compares."""
    value = share * 100
    if abs(value) < 0.001:
        return "0 %" if value == 0 else "less than 0.001 %"
    return f"{value:.0f} %" if abs(value) >= 10 else f"{value:.2g} %"


def thousands(n: int) -> str:
    return f"{n:,}"


def ago(moment: datetime) -> str:
    """How long since, in the largest unit that fits; a date after a month."""
    seconds = (now() - moment).total_seconds()
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        n = int(seconds // length)
        if unit == "day" and n > 30:
            return day(moment)
        if n >= 1:
            return f"{n} {unit}{'' if n == 1 else 's'} ago"
    return "just now"


def until(moment: datetime) -> str:
    """How long to go, in the largest unit that fits."""
    seconds = (moment - now()).total_seconds()
    return "now" if seconds < 1 else f"in {duration(seconds)}"


def full_time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def day(moment: datetime) -> str:
    return f"{moment.day} {moment:%b %Y}"


def iso(moment: datetime) -> str:
    return moment.isoformat()


def duration(seconds: float) -> str:
    """Time left, as exactly as anybody knows it."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def steps(progress: JobProgress) -> str:
    """How far a job is, in its own unit."""
    if progress.unit == "bytes":
        return f"{size(progress.done)} of {size(progress.total or 0)}"
    return f"{progress.done} of {progress.total} {progress.unit}"


def pretty(canonical: str) -> str:
    """JSON with one value per line."""
    return json.dumps(json.loads(canonical), indent=2, ensure_ascii=False)


def _version() -> str:
    try:
        return version("grafthub")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return ""


_environment = Environment(
    loader=PackageLoader("hub.web"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters |= {
    function.__name__: function
    for function in (
        sentence,
        size,
        count,
        thousands,
        ago,
        day,
        full_time,
        iso,
        duration,
        steps,
        pretty,
    )
}
_environment.globals |= {"static": static_files.address, "version": _version(), "until": until}
