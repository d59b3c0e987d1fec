"""`graft import`: a folder of adapters becomes repos on a hub, each with its sidecars."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from cli.connection import Connection, HubRefused, connection, explained
from cli.console import CommandError, byte_progress, err, n_files, out, plain, print_json
from cli.repos import commit_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from cli.import_plan import Import, Refused

NEW, MORE, THERE, TWICE = "new", "more files", "there", "twice here"
CARD = "README.md"


def register(app: typer.Typer) -> None:
    app.command("import")(import_folder)


def import_folder(
    folder: Annotated[Path, typer.Argument(help="searched with all folders in it", metavar="DIR")],
    namespace: Annotated[
        str | None, typer.Option(help="user or organisation that gets the repos; else you")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="only you see the new repos")] = False,
    update: Annotated[
        bool, typer.Option("--update", help="weights that changed become a new commit")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would become which repo")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Put every adapter in a folder on the hub, with what other programs wrote beside it.

    Sidecars and pictures go along and become the card. What is on the hub already is left as it
    is, so a command that was interrupted goes on when it is repeated.
    """
    from cli.import_plan import plan

    if not folder.is_dir():
        raise CommandError(f"{folder}: there is no such folder")
    hub = connection()
    if hub.token is None:
        raise CommandError(f"not logged in to {hub.endpoint}: run `graft login`")
    api = hub.api()
    with explained(hub):
        namespace = namespace or str(api.whoami()["name"])
    found, refused = plan(folder)
    if not found and not refused:
        raise CommandError(f"{folder}: there are no adapters in this folder")
    steps: list[_Step] = []
    for step in _compared(hub, api, namespace, found, update=update):
        if isinstance(step, _Step):
            steps.append(step)
        else:
            refused.append(step)
    if not dry_run:
        steps = list(_sent(hub, api, steps, refused, private=private))
    _print(folder, steps, refused, as_json=as_json, dry_run=dry_run)
    if refused:
        raise CommandError(f"{n_files(refused)} of {folder} {_are(refused)} not imported")


@dataclass(frozen=True, slots=True)
class _Step:
    """What is to be done for one adapter: the files that its repo lacks."""

    item: "Import"
    repo: str
    state: str
    files: Mapping[str, Path | bytes]
    commit: str | None = None

    def to_json(self, folder: Path) -> dict[str, Any]:
        return {
            "file": self.item.path.relative_to(folder).as_posix(),
            "what": self.item.what,
            "repo": self.repo,
            "state": self.state,
            "files": sorted(self.files),
            "commit": self.commit,
        }


def _compared(
    hub: Connection, api: "HfApi", namespace: str, found: "list[Import]", *, update: bool
) -> "Iterator[_Step | Refused]":
    """Each adapter against what the hub has; reads every file once."""
    from merge.formats.hashes import sha256_file

    seen: dict[str, Import] = {}
    with byte_progress("comparing", sum(i.path.stat().st_size for i in found)) as progress:
        for item in found:
            sha256 = sha256_file(item.path)
            progress.advance(progress.task_ids[0], item.path.stat().st_size)
            if (first := seen.get(sha256)) is not None:
                yield _Step(item, f"{namespace}/{first.name}", TWICE, {})
                continue
            seen[sha256] = item
            yield _step(hub, api, f"{namespace}/{item.name}", item, sha256, update=update)


def _step(
    hub: Connection, api: "HfApi", repo: str, item: "Import", sha256: str, *, update: bool
) -> "_Step | Refused":
    from cli.import_plan import Refused, card

    files = dict(item.files)
    present = _on_hub(hub, api, repo)
    is_by_name = present is not None and item.weights in present
    # It may have been moved, or be known by another name since another file has its own.
    if not is_by_name and (known := _known(hub, repo.partition("/")[0], sha256)) is not None:
        return _Step(item, known, THERE, {})
    if CARD not in files and CARD not in (present or {}):
        files[CARD] = card(item)
    if not present:
        return _Step(item, repo, NEW, files)
    if not is_by_name:
        return Refused(item.path, f"{repo} is on the hub and holds other files")
    lacking = {name: file for name, file in files.items() if not _is_same(file, present.get(name))}
    if item.weights in lacking and not update:
        return Refused(
            item.path, f"{repo} holds other weights of this name: --update replaces them"
        )
    return _Step(item, repo, MORE if lacking else THERE, lacking)


def _on_hub(hub: Connection, api: "HfApi", repo: str) -> dict[str, str] | None:
    """Path -> SHA-256 of an LFS file, git id of another, at `main`; None without the repo."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    with explained(hub, repo):
        try:
            tree = list(api.list_repo_tree(repo, recursive=True))
        except RepositoryNotFoundError:
            return None
    files = [item for item in tree if isinstance(item, RepoFile)]
    return {f.path: f.lfs.sha256 if f.lfs is not None else f.blob_id for f in files}


def _known(hub: Connection, namespace: str, sha256: str) -> str | None:
    """A repo of the namespace whose `main` has these bytes."""
    answer = hub.find(f"/api/hashes/{sha256}")
    repos = [str(match["item"]["repo"]) for match in (answer or {"items": []})["items"]]
    mine = (repo for repo in repos if repo.partition("/")[0].lower() == namespace.lower())
    return next(mine, None)


def _is_same(file: Path | bytes, present: str | None) -> bool:
    from hashlib import file_digest, sha256

    from huggingface_hub.utils.sha import git_hash

    if present is None:
        return False
    if len(present) == 40:
        return git_hash(file if isinstance(file, bytes) else file.read_bytes()) == present
    if isinstance(file, bytes):
        return sha256(file).hexdigest() == present
    with file.open("rb") as opened:
        return file_digest(opened, "sha256").hexdigest() == present


def _sent(
    hub: Connection, api: "HfApi", steps: list[_Step], refused: "list[Refused]", *, private: bool
) -> Iterator[_Step]:
    """One commit each: an adapter is on the hub with all its files, or not at all."""
    from cli.import_plan import Refused

    todo = [step for step in steps if step.files]
    total = sum(_size(file) for step in todo for file in step.files.values())
    done = 0
    with byte_progress("importing", total) as progress:
        for step in steps:
            if not step.files:
                yield step
                continue
            try:
                with explained(hub, step.repo):
                    if step.state == NEW:
                        api.create_repo(step.repo, private=private, exist_ok=True)
                    title = f"Import {step.item.weights}"
                    commit = commit_files(api, step.repo, step.files, title, progress)
            except HubRefused as error:
                refused.append(Refused(step.item.path, str(error)))
                continue
            except CommandError as error:
                raise CommandError(
                    f"{error}; {done} of {n_files(todo)} went before, and the same command goes on"
                ) from error
            done += 1
            yield replace(step, commit=commit)


def _size(file: Path | bytes) -> int:
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def _print(
    folder: Path, steps: list[_Step], refused: "list[Refused]", *, as_json: bool, dry_run: bool
) -> None:
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "imports": [step.to_json(folder) for step in steps],
                "refused": [
                    {"file": r.path.relative_to(folder).as_posix(), "why": r.why} for r in refused
                ],
            }
        )
        return
    table = Table(box=None, pad_edge=False)
    for column in ("file", "is", "repo", "size", "files", ""):
        table.add_column(column, overflow="fold")
    for step in steps:
        name = plain(step.item.path.relative_to(folder).as_posix())
        size = decimal(step.item.n_bytes)
        table.add_row(
            name, plain(step.item.what), step.repo, size, str(len(step.files)), step.state
        )
    if steps:
        out.print(table)
    for r in refused:
        err.print(plain(f"{r.path.relative_to(folder).as_posix()}: {r.why}"))
    new = [step for step in steps if step.files]
    rest = len(steps) - len(new)
    would = "would be sent" if dry_run else "sent"
    out.print(f"{len(new)} {would}, {rest} there before, {len(refused)} refused")


def _are(files: "list[Refused]") -> str:
    return "was" if len(files) == 1 else "were"
