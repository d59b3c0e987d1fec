"""Commands about repos on a hub: login, whoami, push, pull, show, search."""

import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from enum import StrEnum
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer
from rich import filesize
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from cli.connection import Connection, connection, explained, normal_endpoint, store
from cli.console import CommandError, byte_progress, err, n_files, out, print_json
from cli.refs import OnHub, bar_class, parse_ref

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

# Smaller files are sent without a reader of their own: the bar would not show them.
COUNTED_BYTES = 2**20

JSON = Annotated[bool, typer.Option("--json", help="print one JSON document")]


class Sort(StrEnum):
    """What a search can be sorted by."""

    RELEVANCE = "relevance"
    UPDATED = "updated"
    CREATED = "created"
    DOWNLOADS = "downloads"
    LIKES = "likes"
    NAME = "name"
    SIZE = "size"


def register(app: typer.Typer) -> None:
    for command in (login, whoami, push, pull, show, search):
        app.command()(command)


def login(
    endpoint: Annotated[str | None, typer.Argument(help="address of the hub")] = None,
    token: Annotated[
        str | None, typer.Option(help="token; asked for, or read from standard input, without it")
    ] = None,
) -> None:
    """Remember a hub and a token for it, after asking the hub whose token it is."""
    address = normal_endpoint(endpoint) if endpoint else connection().endpoint
    secret = (token or os.environ.get("GRAFT_TOKEN") or _ask(address)).strip()
    if not secret:
        raise CommandError("an empty token opens nothing")
    user = _whoami(Connection(address, secret))
    path = store(address, secret)
    out.print(f"Logged in to {address} as {user['name']}; the token is in {path}.", markup=False)


def whoami(as_json: JSON = False) -> None:
    """The user that the hub sees, and which hub that is."""
    hub = connection()
    if hub.token is None:
        raise CommandError(f"not logged in to {hub.endpoint}: run `graft login`")
    user = _whoami(hub)
    if as_json:
        orgs = [org["name"] for org in user.get("orgs", [])]
        print_json({"endpoint": hub.endpoint, "name": user["name"], "orgs": orgs})
    else:
        out.print(f"{user['name']} on {hub.endpoint}", markup=False)


def push(
    path: Annotated[Path, typer.Argument(help="file or folder")],
    repo: Annotated[str, typer.Argument(help="namespace/name, or a name in your own namespace")],
    message: Annotated[str | None, typer.Option("-m", "--message", help="of the commit")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="if the repo is new, only you see it")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Upload a file or a folder as one commit; the repo is made if it is not there."""
    commit = push_files(files_under(path), repo, message, private=private)
    if as_json:
        print_json(commit)
    else:
        out.print(f"{commit['url']} is at commit {commit['commit'][:12]}", markup=False)


def files_under(path: Path) -> dict[str, Path]:
    """Name in the repo -> file, sorted; hidden files and folders stay here."""
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise CommandError(f"{path}: there is no such file or folder")
    found = {
        file.relative_to(path).as_posix(): file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    }
    if not found:
        raise CommandError(f"{path}: the folder holds no files")
    return found


def push_files(
    files: dict[str, Path], repo: str, message: str | None = None, *, private: bool = False
) -> dict[str, str]:
    """Upload as one commit: all of it is visible afterwards, or nothing. {repo, commit, url}."""
    hub = connection()
    if hub.token is None:
        raise CommandError(f"not logged in to {hub.endpoint}: run `graft login`")
    api = hub.api()
    if "/" not in repo:
        repo = f"{_whoami(hub)['name']}/{repo}"
    total = sum(file.stat().st_size for file in files.values())
    with explained(hub, repo), byte_progress(f"push {repo}", total) as progress:
        if not api.repo_exists(repo):
            api.create_repo(repo, private=private, exist_ok=True)
        elif private and not api.model_info(repo).private:
            raise CommandError(f"{repo} is there already and everybody can see it")
        title = message or (
            f"Upload {len(files)} files" if len(files) > 1 else f"Upload {min(files)}"
        )
        try:
            commit = commit_files(api, repo, files, title, progress)
        except OSError as error:
            if error.filename is None:  # Not a file of ours: HTTP errors are OSErrors too.
                raise
            raise CommandError(f"{error.filename}: {error.strerror}") from error
        progress.update(progress.task_ids[0], completed=total)
    return {"repo": repo, "commit": commit, "url": f"{hub.endpoint}/{repo}"}


def commit_files(
    api: "HfApi",
    repo: str,
    files: Mapping[str, Path | bytes],
    title: str,
    progress: Progress,
) -> str:
    """Send files, or bytes as files, as one commit on `main`; its id. The bar advances."""
    from huggingface_hub import CommitOperationAdd

    task = progress.task_ids[0]
    operations = []
    with ExitStack() as stack:
        readers = []
        for name, file in files.items():
            size = len(file) if isinstance(file, bytes) else file.stat().st_size
            if isinstance(file, bytes) or size < COUNTED_BYTES:
                operations.append(CommitOperationAdd(name, file))
                progress.advance(task, size)
                continue
            reader = stack.enter_context(_Counted(file, partial(progress.advance, task)))
            readers.append(reader)
            operations.append(CommitOperationAdd(name, reader))
        # Making the operations has read the files once, to hash them.
        for reader in readers:
            reader.count = True
        return api.create_commit(repo, operations, commit_message=title).oid


class _Counted(io.BufferedReader):
    """A file whose reads advance the bar, once what is read is what is sent."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path), COUNTED_BYTES)
        self.count = False
        self._advance = advance

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if self.count:
            self._advance(len(data))
        return data


def pull(
    repo: Annotated[str, typer.Argument(help="namespace/name[@revision][:file]")],
    dest: Annotated[Path | None, typer.Argument(help="folder; the repo's name without it")] = None,
    as_json: JSON = False,
) -> None:
    """Download the files of a repo, checked against their digests."""
    ref = parse_ref(repo)
    if not isinstance(ref, OnHub) or ref.huggingface:
        raise CommandError(f"{repo} is not a repo: write namespace/name[@revision][:file]")
    target = dest or Path(PurePosixPath(ref.repo).name)
    if target.exists() and not target.is_dir():
        raise CommandError(f"{target} is there and is no folder")
    commit, files = _pull(connection(), ref, target)
    if as_json:
        print_json({"repo": ref.repo, "commit": commit, "path": str(target), "files": files})
    else:
        out.print(f"{target}: {n_files(files)} of {ref.repo} at {commit[:12]}", markup=False)


def _pull(hub: Connection, ref: OnHub, target: Path) -> tuple[str, list[str]]:
    from huggingface_hub.hf_api import RepoFile

    api = hub.api()
    with explained(hub, ref.repo):
        commit = str(api.model_info(ref.repo, revision=ref.revision).sha)
        tree = api.list_repo_tree(ref.repo, recursive=True, revision=commit)
        files = [item for item in tree if isinstance(item, RepoFile)]
        if ref.file is not None:
            files = [f for f in files if f.path == ref.file or f.path.startswith(ref.file + "/")]
            if not files:
                raise CommandError(f"{ref.repo} has no file {ref.file}")
        # Beside the target, so that moving is renaming; kept on failure, so that a repeat resumes.
        whole = target.resolve()
        part = whole.with_name(f".{whole.name}.{commit[:12]}.part")
        try:
            _download(api, ref.repo, commit, files, part)
            _check_digests(ref.repo, files, part)
            _move_in(files, part, target)
        except OSError as error:
            if error.filename is None:  # HTTP errors are OSErrors too.
                raise
            raise CommandError(f"{error.filename}: {error.strerror}") from error
    return commit, [file.path for file in files]


def _download(api: "HfApi", repo: str, commit: str, files: "list[RepoFile]", folder: Path) -> None:
    with byte_progress(f"pull {repo}", sum(file.size for file in files)) as progress:
        bar = bar_class(progress)
        for file in files:
            api.hf_hub_download(repo, file.path, revision=commit, local_dir=folder, tqdm_class=bar)


def _check_digests(repo: str, files: "list[RepoFile]", folder: Path) -> None:
    for file in files:
        path = folder / file.path
        if file.lfs is not None:
            with path.open("rb") as data:
                found = hashlib.file_digest(data, "sha256").hexdigest()
            if found != file.lfs.sha256:
                path.unlink()
                raise CommandError(f"{repo}: {file.path} arrived damaged; try again")


def _move_in(files: "list[RepoFile]", part: Path, target: Path) -> None:
    shutil.rmtree(part / ".cache/huggingface")
    with suppress(OSError):  # The repo may have a .cache of its own.
        (part / ".cache").rmdir()
    if not target.exists():
        os.rename(part, target)
        return
    for file in files:
        (target / file.path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part / file.path, target / file.path)
    shutil.rmtree(part)


def show(
    repo: Annotated[str, typer.Argument(help="namespace/name[@revision]")], as_json: JSON = False
) -> None:
    """A repo: what its files say they are, its commit, its tags."""
    ref = parse_ref(repo)
    if not isinstance(ref, OnHub) or ref.huggingface or ref.file is not None:
        raise CommandError(f"{repo} is not a repo: write namespace/name[@revision]")
    hub = connection()
    with explained(hub, ref.repo):
        info = hub.api().model_info(ref.repo, revision=ref.revision, files_metadata=True)
    files = [{"file": s.rfilename, "size_bytes": s.size} for s in info.siblings or []]
    # The catalogue describes `main`; files of another revision may not be in it.
    known = [
        hub.get(f"/api/adapters/{ref.repo}/{quote(str(file['file']))}")
        for file in files
        if ref.revision is None and str(file["file"]).endswith(".safetensors")
    ]
    answer = {
        "repo": info.id,
        "commit": info.sha,
        "private": info.private,
        "last_modified": info.last_modified and info.last_modified.isoformat(),
        "downloads": info.downloads,
        "tags": info.tags,
        "files": files,
        "adapters": known,
    }
    if as_json:
        print_json(answer)
        return
    visibility = "private" if info.private else "public"
    out.print(f"{info.id} at {str(info.sha)[:12]}, {visibility}", markup=False)
    for adapter in known:
        words = ", ".join(adapter["trigger_words"])
        out.print(f"{adapter['title']}{f': {words}' if words else ''}", markup=False)
    by_file = {adapter["file"]: adapter for adapter in known}
    _table(
        [file | by_file.get(str(file["file"]), {}) for file in files],
        ("file", "kind", "algorithm", "family", "rank", "size"),
    )


def search(
    query: Annotated[str, typer.Argument(help="words, or a hash")] = "",
    base: Annotated[str | None, typer.Option(help="family of the base model")] = None,
    algorithm: Annotated[str | None, typer.Option(help="lora, …")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="may be repeated")] = None,
    sort: Annotated[Sort | None, typer.Option(help="what comes first")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="how many at most")] = 20,
    as_json: JSON = False,
) -> None:
    """Files on the hub that match words and facets."""
    params = {
        "q": query,
        "family": base,
        "algorithm": algorithm,
        "tag": tag,
        "sort": sort,
        "limit": limit,
    }
    answer = connection().get("/api/adapters", {k: v for k, v in params.items() if v})
    if as_json:
        print_json(answer)
        return
    if not answer["items"]:
        err.print("nothing matches")
    _table(answer["items"], ("repo", "file", "kind", "algorithm", "family", "rank", "size"))
    if answer["next_cursor"]:
        err.print(f"{answer['total']} match; use --limit or narrower words")


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(column, row) for column in columns))
    out.print(table)


def _cell(column: str, row: dict[str, Any]) -> str:
    if column == "rank":
        low, high = row.get("rank_min"), row.get("rank_max")
        return "" if low is None else str(low) if low == high else f"{low}-{high}"
    if column == "size":
        return filesize.decimal(int(row["size_bytes"] or 0))
    text = str(row.get(column) or "")
    # File names come from strangers: nothing in them may steer the terminal.
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _whoami(hub: Connection) -> dict[str, Any]:
    with explained(hub):
        return hub.api().whoami()


def _ask(address: str) -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    return str(typer.prompt(f"Token for {address}", hide_input=True))
