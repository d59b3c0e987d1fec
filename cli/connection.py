"""Which hub the commands talk to: GRAFT_ENDPOINT and GRAFT_TOKEN, then what `graft login` stored."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli.console import CommandError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DEFAULT_ENDPOINT = "http://127.0.0.1:8470"


class HubRefused(CommandError):
    """The hub answered, and the answer was no."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A hub and the token for it; the token of one hub is never sent to another."""

    endpoint: str
    token: str | None

    def api(self) -> "HfApi":
        """A Hugging Face client of this hub, whose uploads go over plain HTTP."""
        _prepare_client()
        from huggingface_hub import HfApi

        # `False` and not None: None would send the user's huggingface.co token here.
        # The header asks our hub to take all but small files over LFS; others ignore it.
        return HfApi(
            endpoint=self.endpoint,
            token=self.token or False,
            headers={"X-Graft-Upload": "lfs"},
        )

    def find(self, path: str) -> Any:
        """As `get`, but None where the hub has nothing of that name."""
        return self._ask("GET", path, may_be_absent=True, timeout=30)

    def get(self, path: str, params: dict[str, Any] | None = None) -> Any:
        """The JSON answer of one of the hub's own routes; CommandError on anything else."""
        return self._ask("GET", path, params=params or {}, timeout=30)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """As `get`, of a route that may take as long as it wants."""
        return self._ask("POST", path, json=body, timeout=None)

    def _ask(self, method: str, path: str, *, may_be_absent: bool = False, **asked: Any) -> Any:
        import httpx2

        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with explained(self):
            answer = httpx2.request(method, self.endpoint + path, headers=headers, **asked)
            if may_be_absent and answer.status_code == 404:
                return None
            answer.raise_for_status()
            try:
                return answer.json()
            except ValueError as error:
                raise CommandError(f"{self.endpoint} does not answer as a hub does") from error


def connection() -> Connection:
    """The hub of the environment, else of `graft login`, else a hub on this machine."""
    stored = _stored()
    endpoint = normal_endpoint(
        os.environ.get("GRAFT_ENDPOINT") or (stored.endpoint if stored else DEFAULT_ENDPOINT)
    )
    token = os.environ.get("GRAFT_TOKEN") or None
    if token is None and stored is not None and stored.endpoint == endpoint:
        token = stored.token
    return Connection(endpoint, token)


def normal_endpoint(text: str) -> str:
    """`https://host[:port][/prefix]` without a trailing slash; CommandError if it is no such URL."""
    text = text.strip().rstrip("/")
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", text):
        raise CommandError(f"{text or 'the endpoint'} is not an address like https://hub.example")
    return text


def store(endpoint: str, token: str) -> Path:
    """Remember a hub and its token, readable by this user only."""
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"endpoint": endpoint, "token": token}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return path


def _stored() -> Connection | None:
    path = _file()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Connection(normal_endpoint(data["endpoint"]), data["token"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{path} cannot be read; remove it and run `graft login`") from error


def _file() -> Path:
    return Path(typer.get_app_dir("graft")) / "hub.json"


@contextmanager
def explained(hub: Connection, repo: str | None = None) -> Iterator[None]:
    """Turn what HTTP clients raise into the one sentence a user can act on."""
    _prepare_client()
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except RuntimeError as error:
        # What huggingface_hub makes of any failure inside an LFS upload.
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise HubRefused(_refused(hub, cause.response)) from error
        if isinstance(cause, httpx2.TransportError):
            raise CommandError(f"{hub.endpoint} stopped answering") from error
        raise
    except errors.RevisionNotFoundError as error:
        raise CommandError(f"{repo} has no such revision on {hub.endpoint}") from error
    except errors.RemoteEntryNotFoundError as error:
        raise CommandError(f"{repo} has no such file on {hub.endpoint}") from error
    except errors.RepositoryNotFoundError as error:
        if hub.token is None:
            raise CommandError(
                f"{repo} is not on {hub.endpoint}, or it is private: run `graft login`"
            ) from error
        raise CommandError(f"{repo} is not on {hub.endpoint}, or not yours to see") from error
    except errors.HFValidationError as error:
        raise CommandError(f"{repo} is not a repo name: write namespace/name") from error
    except (errors.HfHubHTTPError, httpx2.HTTPStatusError) as error:
        raise HubRefused(_refused(hub, error.response)) from error
    except ValueError as error:
        # How huggingface_hub tells of a card that the hub refused and of a failed LFS batch.
        raise HubRefused(f"{repo}: {' '.join(str(error).split())}") from error
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise HubRefused(_refused(hub, cause.response)) from error
        raise CommandError(f"{hub.endpoint} does not answer; is the hub running?") from error
    except httpx2.TimeoutException as error:
        raise CommandError(f"{hub.endpoint} stopped answering") from error
    except httpx2.TransportError as error:
        raise CommandError(f"{hub.endpoint} does not answer; is the hub running?") from error


def _prepare_client() -> None:
    """Must run before huggingface_hub is imported, which reads these once.

    Over LFS a large file is read once and sent as it is, and a refusal names its cause, as hf_xet's
    do not; the bars are ours.
    """
    for name in ("DISABLE_XET", "DISABLE_PROGRESS_BARS", "DISABLE_TELEMETRY"):
        os.environ[f"HF_HUB_{name}"] = "1"
    os.environ["HF_HUB_VERBOSITY"] = "error"


def _refused(hub: Connection, response: Any) -> str:
    if response.status_code == 401:
        if hub.token is None:
            return f"{hub.endpoint} wants to know who you are: run `graft login`"
        if os.environ.get("GRAFT_TOKEN"):
            return f"{hub.endpoint} does not accept the token in GRAFT_TOKEN"
        return f"{hub.endpoint} does not accept this token; `graft login` stores another one"
    message = response.headers.get("X-Error-Message")
    if not message:
        try:
            body = response.json()
            message = body["error"]["message"] if isinstance(body["error"], dict) else body["error"]
        except (ValueError, KeyError, TypeError):
            message = f"status {response.status_code}"
    return f"{hub.endpoint} refused: {message}"
