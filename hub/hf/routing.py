"""Routes of the Hugging Face façade: matched on the raw path, errors in the form its clients read.

Revisions and tree paths arrive as one segment with `/` written `%2F`; the decoded path that
frameworks route on cannot tell `refs%2Fpr%2F1/x` from `refs/pr/1/x`.
"""

from http import HTTPStatus
from urllib.parse import unquote

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.convertors import Convertor, register_url_convertor
from starlette.routing import Match
from starlette.types import Scope

from hub.deps import public_url
from hub.errors import EntryNotFound, GatedRepo, HubError, RepoNotFound, Unauthorized

TAG = "hf"
# The header of our own command line; its value says how it sends large files.
OUR_COMMAND = "X-Graft-Upload"
# For bodies that are streamed: their route counts and compares with a setting.
UNLIMITED = 2**62

# What clients do with these messages is fixed in huggingface_hub's `hf_raise_for_status`.
BAD_TOKEN = "Invalid credentials in Authorization header"
ANONYMOUS = "Invalid username or password."


class RepoMoved(RepoNotFound):
    """The repo has another name now; `location` is the same address with that name."""

    def __init__(self, location: str) -> None:
        super().__init__(f"the repo is now at {location}")
        self.location = location


class _Words(Convertor[str]):
    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


class _Kinds(_Words):
    """The plural words that stand for a type of repo in addresses."""

    regex = "models|datasets|spaces"


class _OfRepo(_Words):
    """What may follow the name of a repo."""

    regex = (
        "revision|tree|refs|commits|commit|preupload|paths-info|settings|branch|tag|like|likers"
        "|discussions|auth-check|duplicate|safetensors-metadata"
    )


register_url_convertor("repos", _Kinds())
register_url_convertor("of_repo", _OfRepo())


class HFRoute(APIRoute):
    """A route on the raw path; its parameters are percent-decoded once, after matching."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http":
            return super().matches(scope)
        raw_path = scope["raw_path"].decode("ascii")
        if self.path_regex.match(raw_path) is None:
            return Match.NONE, {}
        match, child = super().matches({**scope, "path": raw_path})
        if match is not Match.NONE:
            child["path_params"] = {k: unquote(v) for k, v in child["path_params"].items()}
            if any("\0" in value for value in child["path_params"].values()):
                return Match.NONE, {}
        return match, child


def hf_router() -> APIRouter:
    return APIRouter(route_class=HFRoute, tags=[TAG], include_in_schema=False)


def render(request: Request, error: HubError, status: HTTPStatus) -> Response:
    """The answer that Hugging Face clients turn into their own exception of the same name."""
    anonymous = "authorization" not in request.headers
    if isinstance(error, RepoMoved):
        return Response(status_code=307, headers={"Location": error.location})
    if isinstance(error, RepoNotFound):
        # Missing and forbidden look the same, so that nobody learns which private repos exist.
        if anonymous:
            return refusal(HTTPStatus.UNAUTHORIZED, error.code, ANONYMOUS)
        return refusal(HTTPStatus.NOT_FOUND, error.code, "Repository not found")
    if isinstance(error, GatedRepo):
        restricted = f"Access to {error.type} {error.repo} is restricted"
        if anonymous:
            what = "You must have access to it and be authenticated to access it. Please log in."
            return refusal(HTTPStatus.UNAUTHORIZED, error.code, f"{restricted}. {what}")
        folder = "datasets/" if error.type == "dataset" else ""
        where = f"Visit {public_url(request)}/{folder}{error.repo} to ask for access."
        what = f"{restricted} and you are not in the authorized list. {where}"
        return refusal(status, error.code, what)
    if isinstance(error, Unauthorized):
        return refusal(status, None, ANONYMOUS if anonymous else BAD_TOKEN)
    if isinstance(error, EntryNotFound) and error.commit is not None:
        # With it clients remember that this commit has no such file, and do not ask again.
        return refusal(status, error.code, error.message, {"X-Repo-Commit": error.commit})
    return refusal(status, error.code, error.message)


def refusal(
    status: HTTPStatus, code: str | None, message: str, headers: dict[str, str] | None = None
) -> Response:
    """An error as JSON, and in headers too, because a HEAD request sees nothing else."""
    printable = "".join(c if c.isprintable() else " " for c in message)
    line = " ".join(printable.split()).encode("ascii", "replace").decode()[:500]
    extra = {"X-Error-Message": line, **(headers or {})}
    if code is not None:
        extra["X-Error-Code"] = code
    return JSONResponse({"error": message}, status, extra)


def next_page(request: Request, cursor: str) -> str:
    """The Link header of a page that is not the last.

    Clients follow it as it is: absolute, on the public address, with the same query.
    """
    query = request.url.include_query_params(cursor=cursor).query
    path = request.scope["raw_path"].decode("ascii")
    return f'<{public_url(request)}{path}?{query}>; rel="next"'
