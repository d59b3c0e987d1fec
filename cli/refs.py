"""REF, the way every command names an adapter or a checkpoint, and how its bytes get here.

    path/to/file.safetensors            a file or folder here; so does anything starting ./ ../ / ~
    namespace/name[@revision][:file]    on the hub of `graft login`
    hf://namespace/name[@revision][/file]   on huggingface.co, or HF_ENDPOINT
    s3://bucket/key
    https://…

A path that exists is a path, even if it could be read as `namespace/name`.
`REF=0.8` is a REF with a strength: the text after the last `=` if it is a number.
A REF that itself ends in `=` and a number is written with its strength: `v=2.safetensors=1`
needs nothing, `https://host/get?id=7` is written `https://host/get?id=7=1`.
"""

import hashlib
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Self
from urllib.parse import unquote, urlsplit

from rich.progress import Progress

from cli.connection import Connection, connection, explained
from cli.console import CommandError, WrongUsage, byte_progress
from cli.ranges import Absent, Blocks, Ranged

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from merge.formats.sources import File
    from merge.formats.targets import Target

MAX_BYTES = 64 * 2**30
IDLE_S = 30
TOTAL_S = 6 * 3600
CHUNK = 2**20

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_NAME = r"[A-Za-z0-9_][\w.-]{0,95}/[\w.-]{1,96}"
_ON_HUB = re.compile(rf"(?P<repo>{_NAME})(@(?P<rev>[^:]+))?(:(?P<file>.+))?", re.ASCII)
_ON_HF = re.compile(rf"(?P<repo>{_NAME})(@(?P<rev>[^:/]+))?([:/](?P<file>.+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Local:
    path: Path


@dataclass(frozen=True, slots=True)
class OnHub:
    """A file of a repo, or with `file` None the one adapter or the pipeline that the repo holds."""

    repo: str
    revision: str | None
    file: str | None
    huggingface: bool = False


@dataclass(frozen=True, slots=True)
class OnS3:
    bucket: str
    key: str


@dataclass(frozen=True, slots=True)
class OnWeb:
    url: str


Ref = Local | OnHub | OnS3 | OnWeb


def parse_weighted(text: str) -> tuple[str, float]:
    """`REF=0.8` as (REF, 0.8); the strength is 1.0 where none is written."""
    ref, equals, number = text.rpartition("=")
    if equals and _NUMBER.fullmatch(number):
        strength = float(number)
        if not math.isfinite(strength):
            raise WrongUsage(f"{text}: the strength is too large")
        if not ref:
            raise WrongUsage(f"{text}: there is no REF before the strength")
        return ref, strength
    if equals and number.lower().lstrip("+-") in {"", "nan", "inf", "infinity"}:
        raise WrongUsage(f"{text}: a strength is a number, as in REF=0.8")
    return text, 1.0


def parse_ref(text: str) -> Ref:
    """What a REF names; nothing is looked up but whether it is a path that exists."""
    scheme, colon, rest = text.partition("://")
    if colon and re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        return _of_scheme(text, scheme, rest)
    if not text:
        raise WrongUsage("an empty REF names nothing")
    path = Path(text).expanduser()
    plainly_local = text.startswith(("/", "./", "../", "~", ".\\", "..\\")) or path.is_absolute()
    found = None if plainly_local or os.path.lexists(path) else _ON_HUB.fullmatch(text)
    if found is None:
        return Local(path)
    return OnHub(found["repo"], found["rev"], found["file"])


def _of_scheme(text: str, scheme: str, rest: str) -> Ref:
    if scheme == "hf":
        found = _ON_HF.fullmatch(rest.rstrip("/"))
        if found is None:
            raise WrongUsage(f"{text}: write hf://namespace/name[@revision][/file]")
        revision = unquote(found["rev"]) if found["rev"] else None
        return OnHub(found["repo"], revision, found["file"], huggingface=True)
    if scheme == "s3":
        bucket, _, key = rest.partition("/")
        if not bucket or not key:
            raise WrongUsage(f"{text}: write s3://bucket/key")
        return OnS3(bucket, key)
    if scheme == "https" or (scheme == "http" and _is_loopback(text)):
        return OnWeb(text)
    raise WrongUsage(f"{text}: REFs are paths, namespace/name, hf://, s3:// and https://")


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in {"127.0.0.1", "::1", "localhost"}


def fetch(text: str) -> Path:
    """The file or folder that a REF names, downloaded first if it is not on this machine.

    The adapter_config.json beside an adapter in PEFT's keys decides how it is read, and is
    fetched with it where there is one, from the same folder or URL path. CommandError in one
    sentence; nothing partial is ever returned.
    """
    ref = parse_ref(text)
    match ref:
        case Local():
            return _local(text, ref.path)
        case OnHub():
            return _from_hub(text, ref)
        case OnS3():
            config = OnS3(ref.bucket, _config_of(ref.key))
            there = f"s3://{config.bucket}/{config.key}"
            return _with_config(_from_s3(text, ref), partial(_from_s3, there, config))
        case OnWeb():
            url = urlsplit(ref.url)
            there = url._replace(path=_config_of(url.path)).geturl()
            return _with_config(_from_web(ref.url), partial(_from_web, there))


def adapter_in(path: Path, ref: str) -> Path:
    """The file itself; of a folder the adapter that PEFT or diffusers saved, or its only file."""
    from merge.formats.sources import GENERIC_NAMES

    if not path.is_dir():
        return path
    for name in GENERIC_NAMES:
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if (path / "model_index.json").is_file():
        raise CommandError(f"{ref} is a whole pipeline; name one of its files")
    inside = f"{len(files)} safetensors files" if files else "no safetensors file"
    raise CommandError(f"{ref} is a folder with {inside}; name one file")


def open_ref(text: str, blocks: Blocks) -> "File":
    """The same, but an object in a store is not copied: it is read where it is."""
    ref = parse_ref(text)
    return _open_s3(text, ref, blocks) if isinstance(ref, OnS3) else fetch(text)


def open_source(name: str, blocks: Blocks, *, is_adapter: bool) -> "File":
    """The file of a REF; of an adapter's folder the adapter."""
    file = open_ref(name, blocks)
    return adapter_in(file, name) if is_adapter and isinstance(file, Path) else file


def _local(text: str, path: Path) -> Path:
    try:
        path.stat()
    except FileNotFoundError:
        hint = "" if not text.count("=") else " (a strength is written REF=0.8)"
        raise CommandError(f"{text}: there is no such file or folder{hint}") from None
    except OSError as error:
        raise CommandError(f"{text}: {error.strerror}") from error
    return path


def _from_hub(text: str, ref: OnHub) -> Path:
    hub = _huggingface() if ref.huggingface else connection()
    api = hub.api()
    with _or_no_path(ref), explained(hub, ref.repo):
        info = api.model_info(ref.repo, revision=ref.revision, files_metadata=True)
    with explained(hub, ref.repo):
        sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
        target, files = _wanted(text, ref.file, list(sizes))
        root = _download(api, ref.repo, str(info.sha), files, sizes)
    return root / target


@contextmanager
def _or_no_path(ref: OnHub) -> Iterator[None]:
    """Two names and a slash may have been meant as a path."""
    try:
        yield
    except CommandError as error:
        if ref.huggingface or ref.revision or ref.file:
            raise
        raise CommandError(f"{ref.repo} is no path here, and {error}") from error


def _huggingface() -> Connection:
    from huggingface_hub import get_token

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return Connection(endpoint, get_token())


def _wanted(text: str, file: str | None, names: list[str]) -> tuple[str, list[str]]:
    """What the REF names inside the repo ("" is all of it), and the files that it needs."""
    from merge.formats.folders import files_of_base

    if file is None:
        whole = files_of_base(names)
        if whole is not None:
            return "", whole
        file = _only_weights(text, names)
    folder = file.rstrip("/") + "/"
    inside = [name for name in names if name.startswith(folder)]
    if file not in names and not inside:
        raise CommandError(f"{text}: the repo has no such file")
    config = _config_of(file)
    return file, inside or [file, *({config} & set(names) - {file})]


def _only_weights(text: str, names: list[str]) -> str:
    found = [name for name in names if name.endswith(".safetensors")]
    if not found:
        raise CommandError(f"{text}: the repo holds no .safetensors file")
    if len(found) > 1:
        some = ", ".join(found[:5]) + (", …" if len(found) > 5 else "")
        raise CommandError(f"{text}: which file? write {text}:FILE with one of {some}")
    return found[0]


def _download(
    api: "HfApi", repo: str, commit: str, files: list[str], sizes: dict[str, int]
) -> Path:
    """Into the cache that Hugging Face clients share; its files are complete or absent."""
    with byte_progress(repo, sum(sizes[name] for name in files)) as progress:
        bar = bar_class(progress)
        for name in files:
            path = Path(api.hf_hub_download(repo, name, revision=commit, tqdm_class=bar))
    return path.parents[len(PurePosixPath(name).parts) - 1]


def bar_class(progress: Progress) -> Any:
    """What huggingface_hub takes for a tqdm class; its bars advance the one of `progress`."""
    task = progress.task_ids[0]

    class Bar:
        def __init__(self, *, initial: int = 0, **ignored: object) -> None:
            self.update(initial)

        def update(self, count: float | None = 1) -> None:
            progress.advance(task, count or 0)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *error: object) -> None: ...

    return Bar


# A signed URL is good for one object: for another, its server does not say that there is none.
_ABSENT = {401, 403, 404, 410}


def _with_config(path: Path, fetch_config: Callable[[Path], Path]) -> Path:
    """`path`, with the configuration that `fetch_config` puts beside it if it is a PEFT file."""
    from merge.errors import BadFile
    from merge.formats.adapters import CONFIG_NAME, takes_config
    from merge.formats.header import read_header

    try:
        if not takes_config(read_header(path)):
            return path
    except BadFile:
        return path  # whoever reads it says what is wrong with it
    try:
        fetch_config(path)
    except Absent:
        path.with_name(CONFIG_NAME).unlink(missing_ok=True)
    return path


def _config_of(key: str) -> str:
    return key[: key.rfind("/") + 1] + "adapter_config.json"


def _from_s3(text: str, ref: OnS3, beside: Path | None = None) -> Path:
    from merge.errors import BadFile

    with Blocks() as blocks:
        found = _open_s3(text, ref, blocks)
        try:
            return _save(text, ref.key, found.version, found.size, _chunks(found), beside)
        except BadFile as error:
            raise CommandError(str(error)) from error


def place_of(text: str, *, force: bool) -> "Path | Target":
    """Where `--out` says that a result goes; CannotWrite where a store would not take it.

    CommandError if something is there: `force` lets a file or an object be replaced, and never a
    folder.
    """
    scheme, colon, rest = text.partition("://")
    if not colon:
        return path_of(text, force=force)
    ref = _of_scheme(text, scheme, rest)
    if not isinstance(ref, OnS3):
        raise WrongUsage(f"{text}: results go to a path or to s3://bucket/key")
    with _needing_boto3(text):
        from cli.s3 import S3Target
    target = S3Target(ref.bucket, ref.key)
    if not force and target.exists():
        raise CommandError(f"{text} exists; --force replaces it")
    target.check()
    return target


def path_of(text: str, *, force: bool) -> Path:
    """The same for a result that can only be on a disk here."""
    scheme, colon, _ = text.partition("://")
    if colon:
        raise WrongUsage(f"{text}: this result goes to a path; {scheme}:// is not one")
    path = Path(text).expanduser()
    if path.is_dir():
        raise CommandError(f"{text}: a folder of this name exists; nothing was written")
    if os.path.lexists(path) and not force:
        raise CommandError(f"{text} exists; --force replaces it")
    if not path.parent.is_dir():
        raise CommandError(f"{text}: the folder {path.parent} does not exist; nothing was written")
    return path


def _open_s3(text: str, ref: OnS3, blocks: Blocks) -> Ranged:
    with _needing_boto3(text):
        from cli.s3 import open_s3
    return open_s3(ref.bucket, ref.key, blocks)


@contextmanager
def _needing_boto3(text: str) -> Iterator[None]:
    """Say how to get it where it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CommandError(f"{text}: S3 needs boto3: pip install 'grafthub[train]'") from error


def _chunks(found: Ranged) -> Iterator[bytes]:
    for start in range(0, found.size, CHUNK):
        chunk = bytearray(min(CHUNK, found.size - start))
        found.read_at(memoryview(chunk), start)
        yield bytes(chunk)


def _from_web(url: str, beside: Path | None = None) -> Path:
    import httpx2

    try:
        with httpx2.stream(
            "GET",
            url,
            headers={"Accept-Encoding": "identity"},
            follow_redirects=True,
            timeout=httpx2.Timeout(IDLE_S, connect=10),
        ) as answer:
            if answer.status_code != 200:
                kind = Absent if answer.status_code in _ABSENT else CommandError
                raise kind(f"{url}: the server answers {answer.status_code}")
            if answer.url.scheme != "https" and not _is_loopback(str(answer.url)):
                raise CommandError(f"{url}: it redirects to an address that is not https")
            length = answer.headers.get("Content-Length", "")
            size = int(length) if length.isdecimal() else None
            name = answer.url.path
            version = answer.headers.get("ETag")
            return _save(url, name, version, size, answer.iter_bytes(CHUNK), beside)
    except httpx2.TimeoutException as error:
        raise CommandError(f"{url}: the server stopped answering") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise CommandError(f"{url}: {error}") from error


def _save(
    source: str,
    name: str,
    version: str | None,
    size: int | None,
    body: Iterator[bytes],
    beside: Path | None,
) -> Path:
    """Keep what `source` sends in the cache; a second fetch of the same version reads no bytes.

    The configuration of the file `beside` goes next to it, over the one that was there.
    """
    key = hashlib.sha256(f"{source}\n{version}".encode()).hexdigest()[:32]
    safe = re.sub(r"[^\w.-]", "_", PurePosixPath(name).name, flags=re.ASCII)[-128:].lstrip(".")
    target = _cache() / key / (safe or "file")
    if beside is not None:
        target, version = beside.with_name(_config_of("")), None
    if version is not None and target.exists() and size in (None, target.stat().st_size):
        return target
    if size is not None and size > MAX_BYTES:
        raise CommandError(f"{source}: {size} bytes are more than {MAX_BYTES}")
    deadline = time.monotonic() + TOTAL_S
    with _whole(source, target) as file, byte_progress(target.name, size) as progress:
        seen = 0
        for chunk in body:
            seen += len(chunk)
            if seen > MAX_BYTES:
                raise CommandError(f"{source}: it sends more than {MAX_BYTES} bytes")
            if time.monotonic() > deadline:
                raise CommandError(f"{source}: the download took more than {TOTAL_S} s")
            file.write(chunk)
            progress.advance(progress.task_ids[0], len(chunk))
        if size not in (None, seen):
            raise CommandError(f"{source}: the download ended after {seen} of {size} bytes")
    return target


@contextmanager
def _whole(source: str, target: Path) -> Iterator[IO[bytes]]:
    """A file that appears at `target` when the block ends well, and leaves nothing otherwise."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            try:
                yield file
                file.flush()
                os.replace(file.name, target)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise CommandError(
            f"{source}: cannot keep it in {target.parent}: {error.strerror}"
        ) from error


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "graft" / "refs"
