"""From a child's output to a commit: checked, stored, described, linked to what it came from.

The commit, the lineage and the end of the job are one transaction, conditional on the fence:
an attempt that lost its lease leaves unreferenced blobs and nothing else.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from sqlmodel import Session

from hub.adapters import service as adapters
from hub.adapters.card import MAX_CARD_BYTES, ParsedCard, parse_card
from hub.blobs.store import Sha256, Stored
from hub.context import Hub
from hub.db import UNREACHABLE
from hub.errors import EntryNotFound, Forbidden, RepoNotFound, StaleParent
from hub.failpoints import reach
from hub.jobs import lineage, queue
from hub.jobs.attempt import PASSING
from hub.jobs.card import Facts, Ingredient, code, write_card
from hub.jobs.inputs import Resolved, is_closed
from hub.jobs.models import Job, JobKind
from hub.jobs.queue import Claim
from hub.jobs.schemas import Publish
from hub.repos import commits, refs
from hub.repos import service as repos
from hub.repos.models import CommitEntry, Repo
from hub.repos.operations import Add, Delete
from hub.users.models import Scope, User
from hub.users.service import Viewer
from merge.errors import BadFile
from merge.formats.folders import digest_of_files, is_weight_index
from merge.formats.header import read_header
from merge.formats.metadata import trigger_words
from merge.method_parameters import Linear, Parameters
from merge.recipe import Chosen, Input, Recipe, Source

log = logging.getLogger(__name__)

T = TypeVar("T")
_CARD = "README.md"
_TRIES = 5  # other commits may land on the branch between reading its card and committing


class BadOutput(Exception):
    """What the child left is not what it said it made."""


def output_name(job: Job) -> str:
    """The name the engine writes to in the attempt's scratch folder."""
    path = Publish.model_validate(job.request["publish"]).path
    return PurePosixPath(path).name if path is not None else "pipeline"


def publish(
    hub: Hub,
    claim: Claim,
    manifest: Mapping[str, Any],
    folder: Path,
    beat: Callable[[], None],
    pauses_s: Sequence[float],
) -> None:
    """Commit the output in `folder` and end the job.

    LeaseLost when the attempt lost its job meanwhile, BadOutput, or what refuses the commit.
    `beat` is called between steps that take long; a step for which the store or the database is
    away is tried again after each of the pauses.
    """

    def steadily(step: Callable[[], T]) -> T:
        return _steadily(step, beat, pauses_s)

    job, viewer = steadily(lambda: _asked_for(hub, claim))
    if manifest["recipe_digest"] != job.recipe_digest:
        raise BadOutput("it was made from another recipe")
    stored: dict[str, Stored] = {}
    steadily(lambda: _take_in(hub, job, manifest, folder / output_name(job), beat, stored))
    for tries_left in reversed(range(_TRIES)):
        try:
            repo_id = steadily(lambda: _commit(hub, viewer, claim, job, manifest, stored))
        except StaleParent:
            if tries_left == 0:
                raise
        else:
            reach("J9")
            adapters.project(hub, repo_id)
            return


def _steadily(step: Callable[[], T], beat: Callable[[], None], pauses_s: Sequence[float]) -> T:
    """`step`, again after each pause for as long as what it needs is away.

    Whether a commit was done is not always known; if it was, the next `beat` loses the lease.
    """
    for pause_s in pauses_s:
        try:
            return step()
        except (*PASSING, *UNREACHABLE):
            log.exception("the store or the database does not answer; again in %g s", pause_s)
        time.sleep(pause_s)
        with suppress(*UNREACHABLE):
            beat()
    return step()


def _asked_for(hub: Hub, claim: Claim) -> tuple[Job, Viewer]:
    """The job, and its requester with the rights of this moment, which the commit checks again."""
    with hub.db.read() as session:
        job = session.get_one(Job, claim.job_id)
        user = session.get_one(User, job.requester_id)
    if user.is_disabled:
        raise Forbidden(f"{user.name} may not publish any more")
    return job, Viewer(user, Scope.ADMIN)


def _take_in(
    hub: Hub,
    job: Job,
    manifest: Mapping[str, Any],
    made: Path,
    beat: Callable[[], None],
    stored: dict[str, Stored],
) -> None:
    """Check the output and move it into the store: path in the repo -> blob, in `stored`.

    What is there already went in an earlier try.
    """
    for path, file in sorted(_files(job, made)):
        if path in stored:
            continue
        if file.suffix == ".safetensors":
            _check_header(file)
        beat()
        reach("J6")
        stored[path] = hub.store.adopt(file)
    digests = {path: str(item.sha256) for path, item in stored.items()}
    found = digests[_path(job)] if _path(job) else digest_of_files(digests)
    if found != manifest["sha256"]:
        raise BadOutput(f"its SHA-256 is {found} and not {manifest['sha256']}")
    reach("J7")


def _check_header(file: Path) -> None:
    try:
        read_header(file)
    except BadFile as error:
        raise BadOutput(str(error)) from error


def _files(job: Job, made: Path) -> Iterator[tuple[str, Path]]:
    if _path(job):
        if not made.is_file():
            raise BadOutput("there is no output file")
        yield _path(job), made
        return
    for file in made.rglob("*"):
        if file.is_file():
            yield file.relative_to(made).as_posix(), file


def _path(job: Job) -> str:
    return job.request["publish"]["path"] or ""


def _commit(
    hub: Hub,
    viewer: Viewer,
    claim: Claim,
    job: Job,
    manifest: Mapping[str, Any],
    stored: Mapping[str, Stored],
) -> int:
    target = Publish.model_validate(job.request["publish"])
    resolved = [Resolved.of_json(item) for item in job.request["inputs"]]
    recipe = Recipe.load(job.request["recipe"])
    namespace, _, name = target.repo.partition("/")
    head, old_card = _present(hub, viewer, namespace, name)
    cards = [_card_of(hub, item) for item in resolved]
    facts = _facts(hub, job, recipe, resolved, cards, manifest)
    card = _new_card(hub, old_card, _front(recipe, resolved, cards, facts), facts, name)
    everything = dict(stored)
    if card is not None:
        everything[_CARD] = hub.store.put([card])
    largest = hub.settings.max_regular_bytes
    additions = [
        Add(path, item, lfs=item.git_oid is None or item.size > largest)
        for path, item in everything.items()
    ]
    with hub.db.write() as session:
        repo = repos.create_repo(
            session,
            viewer,
            namespace,
            name,
            private=_is_private(session, target, resolved),
            exist_ok=True,
        )
        present = commits.entries(session, refs.resolve(session, repo))
        if head is None and present:
            raise StaleParent(f"{target.repo} was made by someone else meanwhile")
        _check_still_secret(session, repo, resolved)
        stale = [] if target.path else _stale(stored, [entry.path for entry in present])
        made = commits.create(
            session,
            viewer,
            repo,
            operations=[*additions, *map(Delete, stale)],
            message=target.message or _message(recipe),
            description=f"Recipe {job.recipe_digest}",
            parent=head,
        )
        assert repo.id is not None
        child = (repo.id, made.id, target.path or "", manifest["sha256"])
        lineage.write(session, child, recipe, job.recipe_digest, resolved)
        result = {
            "repo": repo.full_name,
            "commit": made.id,
            "path": target.path or "",
            "sha256": manifest["sha256"],
            "recipe_digest": job.recipe_digest,
            "certificate": manifest["certificate"],
        }
        queue.succeed(session, claim, result)
        reach("J8")
        return repo.id


def _stale(made: Collection[str], present: Iterable[str]) -> Iterator[str]:
    """What the repo holds of an older pipeline that loaders would take for this one's weights.

    That is every other weight file and index in a folder in which the result, itself a folder, has
    weights. At the root, where a transformers model has them, only what its loader looks for:
    adapters there are results of their own.
    """
    weights = [PurePosixPath(path) for path in made if path.endswith(".safetensors")]
    components = {path.parent for path in weights if path.parent.name or _is_model(path.name)}
    for path in present:
        file = PurePosixPath(path)
        is_weights = file.suffix in {".safetensors", ".bin"} or is_weight_index(file.name)
        is_looked_for = file.parent.name or _is_model(file.name)
        if file.parent in components and is_weights and is_looked_for and path not in made:
            yield path


def _is_model(name: str) -> bool:
    """Whether transformers takes a file of this name at a repo's root for weights or their index."""
    return name.startswith(("model-", "model.", "pytorch_model"))


def _is_private(session: Session, target: Publish, resolved: list[Resolved]) -> bool:
    """Of a repo that is made for the result: as asked, else as the strictest input."""
    return bool(target.private) or _secret(session, resolved) is not None


def _check_still_secret(session: Session, repo: Repo, resolved: list[Resolved]) -> None:
    # Visibility may have changed while the job ran.
    secret = _secret(session, resolved)
    if secret is not None and not repo.private:
        raise Forbidden(
            f"{secret} is not open to all and {repo.full_name} is; nothing was published"
        )


def _secret(session: Session, resolved: list[Resolved]) -> str | None:
    for item in resolved:
        repo = session.get(Repo, item.repo_id)
        if is_closed(repo) if repo is not None else item.private:
            return item.repo
    return None


def _present(
    hub: Hub, viewer: Viewer, namespace: str, name: str
) -> tuple[str | None, CommitEntry | None]:
    """The target's head and card, each None where there is none."""
    with hub.db.read() as session:
        try:
            repo = repos.get_repo(session, viewer, namespace, name)
            head = refs.resolve(session, repo)
            return head.id, commits.entry(session, head, _CARD)
        except RepoNotFound:
            return None, None
        except EntryNotFound:
            return head.id, None


def _new_card(
    hub: Hub, old: CommitEntry | None, front: dict[str, Any], facts: Facts, title: str
) -> bytes | None:
    """The card with this result in it; None to leave one alone that we cannot read whole."""
    if old is None:
        return write_card(None, front, facts, title).encode()
    if old.size > MAX_CARD_BYTES:
        return None
    text = _bytes(hub, old)
    try:
        return write_card(text.decode(), front, facts, title).encode()
    except UnicodeDecodeError:
        return None


def _facts(
    hub: Hub,
    job: Job,
    recipe: Recipe,
    resolved: Sequence[Resolved],
    cards: Sequence[ParsedCard],
    manifest: Mapping[str, Any],
) -> Facts:
    by_name = {item.ref: item for item in resolved}
    heard = dict.fromkeys(source.name for source in _heard(recipe))
    triggers = [word for name in heard for word in _triggers(hub, by_name[name])]
    return Facts(
        kind=job.kind,
        path=_path(job),
        ingredients=[_ingredient(by_name[name], part) for name, part in _parts(recipe)],
        method=_method(recipe),
        triggers=list(dict.fromkeys(triggers)),
        losses=_losses(manifest["certificate"]),
        licenses=sorted({card.license or "not stated" for card in cards}),
        recipe_digest=job.recipe_digest,
    )


def _heard(recipe: Recipe) -> Iterator[Source]:
    """The sources whose trigger words the result answers to."""
    if recipe.kind == "bake" and recipe.base is not None:
        yield recipe.base
    if recipe.tuned is not None:
        yield recipe.tuned
    yield from recipe.inputs


def _message(recipe: Recipe) -> str:
    if recipe.kind in ("extract", "resize"):
        return f"{recipe.kind.capitalize()} an adapter"
    n = len(recipe.inputs)
    return f"{recipe.kind.capitalize()} {n} {'adapter' if n == 1 else 'adapters'}"


def _ingredient(item: Resolved, part: str) -> Ingredient:
    return Ingredient(item.repo, item.commit, item.main or "", item.digest, part)


def _parts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every source and its part in the result."""
    if recipe.base is not None:
        yield recipe.base.name, "base"
    if recipe.tuned is not None:
        yield recipe.tuned.name, f"tuned{_bracketed(_kept(recipe.tuned))}"
    for source in recipe.inputs:
        yield source.name, f"{source.strength:g}{_refined(source)}"
        if source.vectors is not None:
            yield source.vectors.name, f"strengths within {code(source.name)}"


def _refined(source: Input) -> str:
    """In words, in brackets; empty where one strength says it all."""
    components, blocks = sorted(source.components.items()), sorted(source.blocks.items())
    parts = [f"{code(name)} {strength:g}" for name, strength in components]
    parts += [f"{code(glob)} \N{MULTIPLICATION SIGN} {factor:g}" for glob, factor in blocks]
    return _bracketed([*parts, *_kept(source)])


def _kept(source: Chosen) -> list[str]:
    only = [f"only {code(glob)}" for glob in source.only]
    return only + [f"without {code(glob)}" for glob in source.leave_out]


def _bracketed(parts: Sequence[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def _method(recipe: Recipe) -> str:
    rank = recipe.rank.model_dump(exclude_none=True)
    (how, value), *_ = rank.items()
    kept = "ranks add up, nothing is cut" if how == "exact" else f"rank: {how} {value}"
    if recipe.kind in ("extract", "resize"):
        return f"{_HOW[JobKind(recipe.kind)]}; {kept}"
    if recipe.kind == "merge":
        return f"{_named(recipe.method)}; {kept}"
    if recipe.method == Linear():
        return "each adapter's change, times its strength, added to the base's weights"
    return (
        f"the adapters' changes, combined by {_named(recipe.method)}, added to the base's weights"
    )


_HOW = {
    JobKind.EXTRACT: "what separates the tuned checkpoint from its base, as factors",
    JobKind.RESIZE: "the same change in factors of another rank",
}


def _named(method: Parameters) -> str:
    """The method with what was chosen for it."""
    said = method.model_dump(exclude={"name"}, exclude_none=True)
    chosen = ", ".join(f"{name} {value}" for name, value in said.items())
    name: str = method.model_dump()["name"]
    return f"{name} ({chosen})" if chosen else name


def _losses(certificate: Mapping[str, Any]) -> list[str]:
    """What the engine measured, in words; norms are Frobenius over all modules."""
    found = []
    if "truncation" in certificate:
        found.append(
            f"Cutting to the chosen rank lost {_percent(certificate['truncation'])} of the change,"
            f" rounding to {certificate['dtype']} {_percent(certificate['rounding'])}"
            " (relative Frobenius norm)."
        )
    if certificate.get("layers_unchanged"):
        found.append(f"The same in both checkpoints: {certificate['layers_unchanged']} layers.")
    if "unchanged" in certificate:
        found.append(
            f"{_percent(certificate['unchanged'])} of the {certificate['elements']:,} weights that"
            " the adapters touch kept their stored value: the change was below their precision."
        )
    if certificate.get("left_out"):
        found.append(f"Left out, as the recipe allows: {len(certificate['left_out'])} modules.")
    return found


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %"


def _triggers(hub: Hub, item: Resolved) -> list[str]:
    if item.main is None:
        return []
    with hub.store.local(Sha256(item.files[item.main])) as file:
        return trigger_words(read_header(file).metadata)


_TAGS = {
    JobKind.MERGE: ("lora", "merge"),
    JobKind.BAKE: ("baked",),
    JobKind.EXTRACT: ("lora", "extracted"),
    JobKind.RESIZE: ("lora", "resized"),
}


def _front(
    recipe: Recipe, resolved: Sequence[Resolved], cards: Sequence[ParsedCard], facts: Facts
) -> dict[str, Any]:
    """Front matter that Hugging Face tools understand; nothing that we do not know."""
    front: dict[str, Any] = {}
    license = _common(card.license for card in cards)
    if license is not None:
        front["license"] = license
    by_name = {item.ref: item for item in resolved}
    base = by_name[recipe.base.name].repo if recipe.base is not None else None
    if base is None:
        base = _common(card.base_model for card in cards)
    if base is not None:
        front["base_model"] = base
    front["tags"] = ["grafthub", *_TAGS[JobKind(recipe.kind)]]
    if facts.triggers:
        front["instance_prompt"] = ", ".join(facts.triggers)
    return front


def _common(values: Iterable[str | None]) -> str | None:
    """What all of them say, or None where they differ or one says nothing."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _card_of(hub: Hub, item: Resolved) -> ParsedCard:
    """The card of an input's repo as it was; an empty one where there is none."""
    with hub.db.read() as session:
        card = session.get(CommitEntry, (item.commit, _CARD))
    return parse_card(_bytes(hub, card)) if card is not None else ParsedCard()


def _bytes(hub: Hub, card: CommitEntry) -> bytes:
    return b"".join(hub.store.open(Sha256(card.sha256), 0, min(card.size, MAX_CARD_BYTES)))
