"""The REFs of a recipe, as commits and blobs of this hub that the viewer may read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Self

from sqlmodel import Session, col, select

from hub.errors import Invalid, NotFound
from hub.repos import service as repos
from hub.repos.models import Commit, CommitEntry, Repo
from hub.users.service import Viewer
from merge.errors import BadRecipe
from merge.formats.folders import digest_of_files
from merge.recipe import Pinned, Recipe, Source

_REF = re.compile(r"(?P<repo>[^/@:]+/[^/@:]+)(@(?P<revision>[^:]+))?(:(?P<file>.+))?")
_INDEX = "model_index.json"
_CONFIG = "adapter_config.json"
_PEFT = "adapter_model.safetensors"


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
        config = _config_of(self.main) if self.main is not None else None
        return self.files.get(config) if config is not None else None

    def to_json(self) -> dict[str, Any]:
        """Stored in the job's request."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Self:
        """The other direction."""
        return cls(**value)


def resolve(session: Session, viewer: Viewer, recipe: Recipe) -> list[Resolved]:
    """Every distinct source of `recipe`, the base first; BadRecipe names the field."""
    named: dict[str, tuple[str, Source]] = {}
    if recipe.base is not None:
        named[recipe.base.name] = ("base", recipe.base)
    for number, source in enumerate(recipe.inputs):
        named.setdefault(source.name, (f"inputs[{number}]", source))
    return [_resolve(session, viewer, param, source) for param, source in named.values()]


def pin(recipe: Recipe, resolved: Sequence[Resolved]) -> Recipe:
    """The recipe with the digests of what its sources resolved to."""
    return recipe.pin(
        {
            item.ref: Pinned(sha256=item.digest, config_sha256=item.config_digest)
            for item in resolved
        }
    )


def _resolve(session: Session, viewer: Viewer, param: str, source: Source) -> Resolved:
    if source.ref is None:
        assert source.sha256 is not None
        return _by_digest(session, viewer, param, source.name, source.sha256)
    match = _REF.fullmatch(source.ref)
    if match is None:
        raise BadRecipe(f"{param}.ref", f"{source.ref!r} is not namespace/name[@revision][:file]")
    namespace, _, name = match["repo"].partition("/")
    try:
        repo = repos.get_repo(session, viewer, namespace, name)
        commit = repos.resolve(session, repo, match["revision"] or "main")
        if match["file"] is not None:
            repos.entry(session, commit, match["file"])
    except (NotFound, Invalid) as error:
        raise BadRecipe(f"{param}.ref", error.message) from error
    files = {item.path: item.sha256 for item in repos.entries(session, commit)}
    if match["file"] is not None:
        main = match["file"]
    elif param == "base" and _INDEX in files:
        main = None
    else:
        main = _only_file(files, param, source.ref)
    return _resolved(source.ref, repo, commit.id, main, files)


def _only_file(files: dict[str, str], param: str, ref: str) -> str:
    weights = sorted(path for path in files if path.endswith(".safetensors"))
    if len(weights) == 1:
        return weights[0]
    found = ", ".join(weights[:5]) + (", …" if len(weights) > 5 else "") or "none"
    raise BadRecipe(
        f"{param}.ref", f"{ref} does not name one .safetensors file; say {ref}:FILE ({found})"
    )


def _by_digest(session: Session, viewer: Viewer, param: str, name: str, sha256: str) -> Resolved:
    """The newest readable place of a blob: knowing a digest is no right to its bytes."""
    found = session.exec(
        select(CommitEntry.path, Commit, Repo)
        .join(Commit, col(Commit.id) == col(CommitEntry.commit_id))
        .join(Repo, col(Repo.id) == col(Commit.repo_id))
        .where(CommitEntry.sha256 == sha256, repos.visible_to(session, viewer))
        .order_by(col(Commit.created_at).desc())
        .limit(1)
    ).first()
    if found is not None:
        path, commit, repo = found
        files = {item.path: item.sha256 for item in repos.entries(session, commit)}
        return _resolved(name, repo, commit.id, path, files)
    raise BadRecipe(f"{param}.sha256", f"this hub has no file {sha256} that you may read")


def _resolved(
    ref: str, repo: Repo, commit: str, main: str | None, files: dict[str, str]
) -> Resolved:
    if main is not None:
        wanted = {main, _config_of(main)}
        files = {path: sha256 for path, sha256 in files.items() if path in wanted}
    assert repo.id is not None
    full_name = f"{repo.namespace}/{repo.name}"
    return Resolved(ref, repo.id, full_name, repo.private, commit, main, files)


def _config_of(main: str) -> str | None:
    """Where a PEFT adapter keeps its alphas: beside it, and only PEFT names its file so."""
    path = PurePosixPath(main)
    return str(path.with_name(_CONFIG)) if path.name == _PEFT else None
