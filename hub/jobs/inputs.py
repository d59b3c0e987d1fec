"""The REFs of a recipe, as commits and blobs of this hub that the viewer may read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Self

from sqlalchemy.orm import aliased
from sqlmodel import Session, col, select

from hub.blobs.store import BlobStore, Sha256
from hub.errors import GatedRepo, Invalid, NotFound
from hub.repos import commits, permissions, refs
from hub.repos import service as repos
from hub.repos.models import Commit, CommitEntry, Repo
from hub.users.service import Viewer
from merge.errors import BadRecipe
from merge.formats.adapters import CONFIG_NAME, takes_config
from merge.formats.folders import digest_of_files, files_of_base
from merge.formats.header import PREFIX_BYTES, header_length, parse_header
from merge.recipe import Pinned, Recipe, Source

_CHECKPOINTS = ("base", "tuned")  # which may be whole folders
_REF = re.compile(r"(?P<repo>[^/@:]+/[^/@:]+)(@(?P<revision>[^:]+))?(:(?P<file>.+))?")

MAX_INPUTS = 100  # of one job or report: the cost of some methods grows with their square


@dataclass(frozen=True, slots=True)
class Resolved:
    """What one source of a recipe is on this hub.

    `files` are what its reader needs, relative path -> SHA-256; `main` is the one it names, or
    None for a whole folder.
    """

    ref: str
    repo_id: int
    repo: str
    private: bool
    commit: str
    main: str | None
    files: dict[str, str]

    @property
    def digest(self) -> str:
        """What a recipe pins: the file's SHA-256, or the folder's digest."""
        return self.files[self.main] if self.main is not None else digest_of_files(self.files)

    @property
    def config_digest(self) -> str | None:
        """Of the adapter_config.json that decides a PEFT file's alphas."""
        return self.files.get(_config_of(self.main)) if self.main is not None else None

    def to_json(self) -> dict[str, Any]:
        """Stored in the job's request."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Self:
        """The other direction."""
        return cls(**value)


def resolve(session: Session, store: BlobStore, viewer: Viewer, recipe: Recipe) -> list[Resolved]:
    """Every distinct file that `recipe` names, the base first; BadRecipe names the field.

    The header of a file beside an adapter_config.json is read, to tell whether it is PEFT's.
    """
    if len(recipe.inputs) > MAX_INPUTS:
        raise BadRecipe("inputs", f"has {len(recipe.inputs)} entries, more than {MAX_INPUTS}")
    named: dict[str, tuple[str, Source]] = {}
    for param, source in recipe.sources():
        named.setdefault(source.name, (param, source))
    return [_resolve(session, store, viewer, param, source) for param, source in named.values()]


def pin(recipe: Recipe, resolved: Sequence[Resolved]) -> Recipe:
    """The recipe with the digests of what its sources resolved to."""
    return recipe.pin(
        {
            item.ref: Pinned(sha256=item.digest, config_sha256=item.config_digest)
            for item in resolved
        }
    )


def _resolve(
    session: Session, store: BlobStore, viewer: Viewer, param: str, source: Source
) -> Resolved:
    if source.ref is None:
        return _by_digest(session, store, viewer, param, source)
    match = _REF.fullmatch(source.ref)
    if match is None:
        raise BadRecipe(f"{param}.ref", f"{source.ref!r} is not namespace/name[@revision][:file]")
    namespace, _, name = match["repo"].partition("/")
    try:
        repo = repos.get_repo(session, viewer, namespace, name)
        permissions.require_files(session, viewer, repo)
        commit = refs.resolve(session, repo, match["revision"] or "main")
        if match["file"] is not None:
            commits.entry(session, commit, match["file"])
    except (NotFound, Invalid, GatedRepo) as error:
        raise BadRecipe(f"{param}.ref", error.message) from error
    files = {item.path: item.sha256 for item in commits.entries(session, commit)}
    if match["file"] is not None:
        main = match["file"]
    elif param in _CHECKPOINTS and (parts := files_of_base(files)) is not None:
        main, files = None, {path: files[path] for path in parts}
    else:
        main = _only_file(files, param, source.ref)
    return _resolved(store, source.ref, repo, commit.id, main, files)


def _only_file(files: dict[str, str], param: str, ref: str) -> str:
    weights = sorted(path for path in files if path.endswith(".safetensors"))
    if len(weights) == 1:
        return weights[0]
    found = ", ".join(weights[:5]) + (", …" if len(weights) > 5 else "") or "none"
    raise BadRecipe(
        f"{param}.ref", f"{ref} does not name one .safetensors file; say {ref}:FILE ({found})"
    )


def _by_digest(
    session: Session, store: BlobStore, viewer: Viewer, param: str, source: Source
) -> Resolved:
    """The newest readable place of a blob: knowing a digest is no right to its bytes.

    A PEFT file may lie beside different configurations: `config_sha256` says which is meant.
    """
    assert source.sha256 is not None
    main = aliased(CommitEntry)
    places = (
        select(main.commit_id, main.path)
        .join(Commit, col(Commit.id) == col(main.commit_id))
        .join(Repo, col(Repo.id) == col(Commit.repo_id))
        .where(main.sha256 == source.sha256, permissions.files_visible_to(session, viewer))
    )
    found = session.exec(places.order_by(col(Commit.created_at).desc())).all()
    if not found:
        what = f"this hub has no file {source.sha256} that you may read"
        raise BadRecipe(f"{param}.sha256", what)
    beside = {
        (commit, path): sha256
        for commit, path, sha256 in session.exec(
            select(CommitEntry.commit_id, CommitEntry.path, CommitEntry.sha256).where(
                col(CommitEntry.path).in_({_config_of(path) for _, path in found}),
                col(CommitEntry.commit_id).in_(places.with_only_columns(col(main.commit_id))),
            )
        )
    }
    configs = {place: beside.get((place[0], _config_of(place[1]))) for place in found}
    chosen = found[0]
    if any(configs.values()) and _takes_config(store, source.sha256, chosen[1]):
        chosen = _with_config(configs, param, source)
    commit = session.get_one(Commit, chosen[0])
    files = {item.path: item.sha256 for item in commits.entries(session, commit)}
    repo = session.get_one(Repo, commit.repo_id)
    return _resolved(store, source.name, repo, commit.id, chosen[1], files)


Place = tuple[str, str]  # commit, path


def _with_config(configs: dict[Place, str | None], param: str, source: Source) -> Place:
    """The first place with the configuration that is meant; one without any cannot be read."""
    param = f"{param}.config_sha256"
    different = {config for config in configs.values() if config is not None}
    wanted = source.config_sha256
    if wanted is None and len(different) > 1:
        some = ", ".join(sorted(different)[:5])
        what = f"say which {CONFIG_NAME} {source.name} is read with; this hub has {some}"
        raise BadRecipe(param, what)
    for place, config in configs.items():
        if config is not None and wanted in (None, config):
            return place
    what = f"this hub has no {CONFIG_NAME} {wanted} beside {source.name} that you may read"
    raise BadRecipe(param, what)


def _resolved(
    store: BlobStore, ref: str, repo: Repo, commit: str, main: str | None, files: dict[str, str]
) -> Resolved:
    if main is not None:
        wanted = {main}
        config = _config_of(main)
        if config in files and _takes_config(store, files[main], main):
            wanted.add(config)
        files = {path: sha256 for path, sha256 in files.items() if path in wanted}
    assert repo.id is not None
    full_name = f"{repo.namespace}/{repo.name}"
    return Resolved(ref, repo.id, full_name, is_closed(repo), commit, main, files)


def is_closed(repo: Repo) -> bool:
    """Whether not everybody may have the files: what is made of them is for nobody else either."""
    return repo.private or repo.gated is not None


def _config_of(main: str) -> str:
    """Where a PEFT adapter keeps its alphas."""
    return str(PurePosixPath(main).with_name(CONFIG_NAME))


def _takes_config(store: BlobStore, sha256: str, path: str) -> bool:
    digest, name = Sha256(sha256), PurePosixPath(path).name
    size = store.size(digest) or 0
    prefix = b"".join(store.open(digest, 0, PREFIX_BYTES))
    end = PREFIX_BYTES + header_length(prefix, size, name)
    return takes_config(parse_header(b"".join(store.open(digest, 0, end)), size, name))
