"""What pages load: shipped inside the package, cached for ever under an address that changes."""

import hashlib
import mimetypes
from functools import cache
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import RedirectResponse, Response

from hub.adapters.routes import IMMUTABLE
from hub.errors import PageNotFound
from hub.web.patterns import pattern_svg

router = APIRouter(include_in_schema=False)
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@cache
def _files() -> dict[str, bytes]:
    folder = resources.files("hub.web") / "static"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@cache
def _build() -> str:
    """One digest over all files, so that modules can import each other by relative names."""
    digest = hashlib.sha256()
    for name, content in sorted(_files().items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def address(name: str) -> str:
    """Where a page finds a file of `hub/web/static`."""
    assert name in _files(), f"hub/web/static has no {name}"
    return f"/static/files/{_build()}/{name}"


@router.get("/static/files/{build}/{name}")
def static_file(build: str, name: str) -> Response:
    """Any build is answered with the present files: a page that is open lives through an update."""
    content = _files().get(name)
    if content is None:
        raise PageNotFound("there is nothing at this address")
    suffix = name[name.rfind(".") :]
    media_type = TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "text/plain"
    age = IMMUTABLE if build == _build() else "no-cache"
    return Response(content, media_type=media_type, headers={"Cache-Control": f"public, {age}"})


@router.get("/static/patterns/{profile}-{seed}.svg")
def pattern(profile: str, seed: str) -> Response:
    """The picture of a file without pictures; everything in it comes from the address."""
    if not (len(profile) == 24 and profile.isascii() and profile.isdigit()):
        raise PageNotFound("there is nothing at this address")
    if not (len(seed) == 8 and all(c in "0123456789abcdef" for c in seed)):
        raise PageNotFound("there is nothing at this address")
    headers = {"Cache-Control": f"public, {IMMUTABLE}"}
    return Response(pattern_svg(profile, seed), media_type="image/svg+xml", headers=headers)


@router.get("/favicon.ico")
def favicon() -> RedirectResponse:
    return RedirectResponse(address("mark.svg"))
