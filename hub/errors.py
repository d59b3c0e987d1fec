"""Errors of the hub, and the one table that gives each family its HTTP status.

HubError
├── NotFound            RepoNotFound RevisionNotFound EntryNotFound JobNotFound RecipeNotFound
│                       HashNotFound UserNotFound PageNotFound InvitationNotFound
│                       AccessRequestNotFound DiscussionNotFound WebhookNotFound
│                       CollectionNotFound
├── Conflict            RepoExists RefExists NameTaken KeyReused LastAdmin
│   │                   IdentityTaken ItemExists
│   ├── CollectionExists  another one of that title; carries its slug
│   └── StaleParent     the branch has moved since the caller looked
├── Invalid             the request asks for something impossible; `param` says where
│   ├── BadName BadPath BadField BadUpload DigestMismatch
│   └── BadRequest      the request cannot be read at all
├── Unauthorized        no valid token
│   └── SignInFailed    at a provider, or its answer proves nothing
├── Forbidden           a valid token that may not do this
│   └── GatedRepo       the repo may be seen; its files are for those who were let in
├── TooLarge            more bytes than a setting allows
├── TooMany             of this user's jobs are not finished yet
│   └── TooManyTries    to sign in; `retry_after_s` says when the next one counts
├── NoSpace             the disk is, or would become, full
│   └── QuotaExceeded   a user or organisation keeps as much as it may
├── StoreFailed         the object store does not answer, or refuses
├── ProviderFailed      the sign-in provider does not answer, or not as one
├── UpstreamFailed      the hub that is mirrored does not answer, or not as a hub does
├── Busy                the database or a process is away, or did not become free in time
├── OutcomeUnknown      the database was lost while it saved a change
├── NotImplementedHere  a feature of the protocol that this hub does not have
└── CannotStart         the hub cannot open its data; never reaches a client

Services raise these and know no HTTP.
A façade whose clients expect another body gives `install` a renderer under the tag of its routes.
"""

import logging
import sqlite3
from collections.abc import Callable, Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from merge.errors import MergeError

log = logging.getLogger(__name__)


class HubError(Exception):
    """A refusal. `code` is stable and is what clients switch on; the message may change."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def code(self) -> str:
        return type(self).__name__


class NotFound(HubError): ...


class RepoNotFound(NotFound): ...


class RevisionNotFound(NotFound): ...


class EntryNotFound(NotFound):
    """A revision without this path; `commit` is what the revision resolved to."""

    def __init__(self, message: str, param: str | None = None, commit: str | None = None) -> None:
        super().__init__(message, param)
        self.commit = commit


class JobNotFound(NotFound): ...


class RecipeNotFound(NotFound): ...


class HashNotFound(NotFound): ...


class UserNotFound(NotFound): ...


class PageNotFound(NotFound): ...


class InvitationNotFound(NotFound): ...


class AccessRequestNotFound(NotFound): ...


class DiscussionNotFound(NotFound): ...


class WebhookNotFound(NotFound): ...


class CollectionNotFound(NotFound): ...


class Conflict(HubError): ...


class RepoExists(Conflict): ...


class RefExists(Conflict): ...


class NameTaken(Conflict): ...


class KeyReused(Conflict): ...


class LastAdmin(Conflict): ...


class IdentityTaken(Conflict): ...


class ItemExists(Conflict): ...


class CollectionExists(Conflict):
    """`slug` is the address of the one that has the title."""

    def __init__(self, message: str, slug: str) -> None:
        super().__init__(message, "title")
        self.slug = slug


class StaleParent(Conflict): ...


class Invalid(HubError): ...


class BadName(Invalid): ...


class BadPath(Invalid): ...


class BadField(Invalid): ...


class BadUpload(Invalid): ...


class DigestMismatch(Invalid): ...


class BadRequest(Invalid): ...


class Unauthorized(HubError): ...


class SignInFailed(Unauthorized): ...


class ProviderFailed(HubError): ...


class UpstreamFailed(HubError): ...


class Forbidden(HubError): ...


class GatedRepo(Forbidden):
    """`repo` is its full name, `type` model or dataset."""

    def __init__(self, repo: str, type: str) -> None:
        super().__init__(f"access to {repo} is restricted: ask for it on the repo's page", "repo")
        self.repo = repo
        self.type = type


class TooLarge(HubError): ...


class TooMany(HubError): ...


class TooManyTries(TooMany):
    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoSpace(HubError): ...


class QuotaExceeded(NoSpace): ...


class StoreFailed(HubError): ...


class Busy(HubError): ...


class OutcomeUnknown(HubError): ...


class NotImplementedHere(HubError): ...


class CannotStart(HubError): ...


STATUS: Mapping[type[HubError], HTTPStatus] = {
    NotFound: HTTPStatus.NOT_FOUND,
    Conflict: HTTPStatus.CONFLICT,
    StaleParent: HTTPStatus.PRECONDITION_FAILED,
    Invalid: HTTPStatus.UNPROCESSABLE_ENTITY,
    BadRequest: HTTPStatus.BAD_REQUEST,
    Unauthorized: HTTPStatus.UNAUTHORIZED,
    Forbidden: HTTPStatus.FORBIDDEN,
    TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    TooMany: HTTPStatus.TOO_MANY_REQUESTS,
    NoSpace: HTTPStatus.INSUFFICIENT_STORAGE,
    StoreFailed: HTTPStatus.SERVICE_UNAVAILABLE,
    ProviderFailed: HTTPStatus.BAD_GATEWAY,
    UpstreamFailed: HTTPStatus.BAD_GATEWAY,
    Busy: HTTPStatus.SERVICE_UNAVAILABLE,
    OutcomeUnknown: HTTPStatus.GATEWAY_TIMEOUT,
    NotImplementedHere: HTTPStatus.NOT_IMPLEMENTED,
    CannotStart: HTTPStatus.INTERNAL_SERVER_ERROR,
}


def status_of(error: type[HubError]) -> HTTPStatus:
    """The status of the nearest family in the table."""
    return next(STATUS[cls] for cls in error.__mro__ if cls in STATUS)


RETRY_AFTER_S = "2"
Renderer = Callable[[Request, HubError, HTTPStatus], Response]


def render(request: Request, error: HubError, status: HTTPStatus) -> Response:
    """The body of our own API: `{"error": {"code", "message", "param"}}`."""
    body = {"error": {"code": error.code, "message": error.message, "param": error.param}}
    headers = {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None
    return JSONResponse(body, status, headers)


def install(app: FastAPI, renderers: Mapping[str, Renderer]) -> None:
    """Give every refusal one body; `renderers` maps a route tag to its façade's own."""

    def answer(request: Request, error: HubError, status: HTTPStatus | None = None) -> Response:
        tags = getattr(request.scope.get("route"), "tags", None) or []
        chosen = next((renderers[tag] for tag in tags if tag in renderers), render)
        response = chosen(request, error, status or status_of(type(error)))
        if response.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
            response.headers["Retry-After"] = RETRY_AFTER_S
        if isinstance(error, TooManyTries):
            response.headers["Retry-After"] = str(error.retry_after_s)
        return response

    @app.exception_handler(HubError)
    def refused(request: Request, error: HubError) -> Response:
        return answer(request, error)

    @app.exception_handler(MergeError)
    def not_mergeable(request: Request, error: MergeError) -> Response:
        return answer(request, _of_merge(error), HTTPStatus.UNPROCESSABLE_ENTITY)

    @app.exception_handler(RequestValidationError)
    def bad_field(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            why = f"the request is not JSON: {first['ctx']['error']}"
            return answer(request, BadField(why))
        place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
        param = ".".join(place) or None
        return answer(request, BadField(f"{param or 'the request'}: {first['msg']}", param))

    @app.exception_handler(HTTPException)
    def routing(request: Request, error: HTTPException) -> Response:
        response = answer(request, _of_status(error), HTTPStatus(error.status_code))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(OperationalError)
    def database(request: Request, error: OperationalError) -> Response:
        if _is_full_disk(error):
            return answer(request, NoSpace("the hub's disk is full; nothing was stored"))
        if not _may_pass(error):
            raise error
        log.warning("the database refused: %s", error.orig)
        return answer(request, Busy("the database is busy or away; nothing was changed, try again"))

    @app.exception_handler(DataError)
    def not_kept(request: Request, error: DataError) -> Response:
        """PostgreSQL takes no NUL in a text, and no number beyond its column."""
        return answer(request, BadField("a text or number that the database cannot keep"))

    @app.exception_handler(OverflowError)
    def too_large(request: Request, error: OverflowError) -> Response:
        """SQLite takes no integer of more than 64 bits."""
        if "SQLite" not in str(error):
            raise error
        return answer(request, BadField("a number that the database cannot keep"))

    @app.exception_handler(UnicodeEncodeError)
    def no_text(request: Request, error: UnicodeEncodeError) -> Response:
        """JSON can spell halves of surrogate pairs, which no database and no hash takes."""
        if error.reason != "surrogates not allowed":
            raise error
        return answer(request, BadField("a text holds half of a surrogate pair"))

    @app.exception_handler(PoolTimeout)
    def busy(request: Request, error: PoolTimeout) -> Response:
        return answer(request, Busy("the database is busy; try again"))


# Classes and codes of PostgreSQL: connections, contention, an administrator who stops the server.
_PASSING = ("08", "40", "53", "55P03", "57")


def _may_pass(error: OperationalError) -> bool:
    """Whether the same request can succeed later; an error without a code is a connection's."""
    sqlite = getattr(error.orig, "sqlite_errorcode", None)
    if sqlite is not None:
        return sqlite & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    code = getattr(error.orig, "sqlstate", None)
    return code is None or code.startswith(_PASSING)


def _is_full_disk(error: OperationalError) -> bool:
    sqlite = getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return sqlite or getattr(error.orig, "sqlstate", None) == "53100"  # PostgreSQL's disk_full


class _Named(HubError):
    """An error that another library or package named; only its code is ours."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self._code = code

    @property
    def code(self) -> str:
        return self._code


def _of_merge(error: MergeError) -> HubError:
    fields = ("param", "module", "key", "file")
    param = next((getattr(error, name) for name in fields if hasattr(error, name)), None)
    return _Named(error.code, str(error), param)


def _of_status(error: HTTPException) -> HubError:
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            return PageNotFound("there is nothing at this address")
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return TooLarge("the body of the request is too large for this address")
        case HTTPStatus.BAD_REQUEST:
            return BadRequest(str(error.detail))
        case status:
            return _Named(HTTPStatus(status).phrase.replace(" ", ""), str(error.detail))
