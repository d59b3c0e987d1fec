"""Unmodified huggingface_hub against a real server process: repos, uploads, downloads, errors."""

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hub.context import open_hub
from tests.fixtures.server import RunningHub, running_hub, settings_of
from tests.hub.conftest import make_user

MiB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def people(folder: Path) -> dict[str, str]:
    """Users other than the administrator, and a token of each; made before the server starts."""
    with open_hub(settings_of(folder)) as hub:
        return {name: make_user(hub, name)[1] for name in ("thief", "reader")}


@pytest.fixture(scope="module")
def hub(folder: Path, people: dict[str, str]) -> Iterator[RunningHub]:
    with running_hub(folder, max_regular_bytes=2 * MiB) as hub:
        yield hub


@pytest.fixture
def api(hub: RunningHub) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.admin_token)


@pytest.fixture
def repo(api: HfApi, request: pytest.FixtureRequest) -> str:
    """A new repo for each test, with a card and an adapter-like file."""
    name = f"admin/r{zlib.crc32(request.node.name.encode()):08x}"
    api.create_repo(name)
    card = b"---\ntags: [lora, ink]\nlicense: mit\nbase_model: acme/base\n---\n# Ink\n"
    api.create_commit(
        name,
        [
            CommitOperationAdd("README.md", card),
            CommitOperationAdd("ink.safetensors", b"ink" * 1000),
            CommitOperationAdd("sub/a b.txt", b"text"),
        ],
        commit_message="first files",
    )
    return name


Client = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def client(hub: RunningHub, tmp_path: Path) -> Client:
    """Run a command as a user would: only HF_ENDPOINT and HF_TOKEN say where and who."""

    def run(*command: str, token: str | None = hub.admin_token, **extra: str) -> object:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        environment |= {"HF_TOKEN": token} if token else {}
        return subprocess.run(
            command,
            check=False,
            env=environment | extra,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run  # type: ignore[return-value]


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def hf(*arguments: str) -> tuple[str, ...]:
    return str(Path(sys.executable).with_name("hf")), *arguments


# Repos


def test_whoami_names_the_user_and_refuses_a_wrong_token(hub: RunningHub, api: HfApi) -> None:
    assert api.whoami()["name"] == "admin"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.url, token="graft_wrong").whoami()


def test_a_repo_is_created_once(hub: RunningHub, api: HfApi) -> None:
    made = api.create_repo("admin/once")
    assert (made.url, made.repo_id) == (f"{hub.url}/admin/once", "admin/once")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("admin/once")
    assert api.create_repo("admin/once", exist_ok=True).repo_id == "admin/once"
    assert api.create_repo("ONCE", exist_ok=True).repo_id == "admin/once"


def test_nothing_is_written_without_a_token(hub: RunningHub, repo: str) -> None:
    anonymous = HfApi(endpoint=hub.url, token=False)
    with pytest.raises(HfHubHTTPError, match="401"):
        anonymous.create_repo("admin/other")
    with pytest.raises(HfHubHTTPError, match="401"):
        anonymous.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo)
    with pytest.raises(HfHubHTTPError, match="401"):
        anonymous.delete_repo(repo)
    assert anonymous.file_exists(repo, "x") is False


def test_a_private_repo_looks_missing_to_others(
    hub: RunningHub, api: HfApi, repo: str, tmp_path: Path
) -> None:
    api.update_repo_settings(repo, private=True)
    assert api.model_info(repo).private is True
    anonymous = HfApi(endpoint=hub.url, token=False)
    assert anonymous.repo_exists(repo) is False
    assert repo not in [model.id for model in anonymous.list_models()]
    with pytest.raises(RepositoryNotFoundError):
        anonymous.hf_hub_download(repo, "ink.safetensors", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        anonymous.model_info(repo)
    for path in ("/api/models/{}", "/{}/resolve/main/README.md", "/api/models/{}/tree/main"):
        private, missing = (
            httpx2.get(hub.url + path.format(name)) for name in (repo, "admin/nothing-here")
        )
        assert private.status_code == missing.status_code == 401
        assert private.headers["X-Error-Code"] == "RepoNotFound"
        assert private.text == missing.text
    api.update_repo_settings(repo, private=False)
    assert anonymous.repo_exists(repo) is True


def test_a_repo_can_be_created_private_by_old_and_new_clients(hub: RunningHub, api: HfApi) -> None:
    api.create_repo("admin/private-new", private=True)
    old = {"name": "private-old", "organization": None, "private": True}
    httpx2.post(f"{hub.url}/api/repos/create", json=old, headers=hub.auth).raise_for_status()
    assert api.model_info("admin/private-new").private is True
    assert api.model_info("admin/private-old").private is True


def test_a_moved_repo_answers_under_its_old_name(
    hub: RunningHub, api: HfApi, repo: str, tmp_path: Path
) -> None:
    api.move_repo(repo, "admin/moved-here")
    assert api.model_info(repo).id == "admin/moved-here"
    path = api.hf_hub_download(repo, "ink.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"ink" * 1000
    api.upload_file(path_or_fileobj=b"later", path_in_repo="later.txt", repo_id=repo)
    assert api.file_exists("admin/moved-here", "later.txt")
    answer = httpx2.head(f"{hub.url}/{repo}/resolve/main/sub/a%20b.txt?x=1")
    assert answer.status_code == 307
    assert answer.headers["Location"] == "/admin/moved-here/resolve/main/sub/a%20b.txt?x=1"


def test_a_deleted_repo_is_gone(api: HfApi, repo: str) -> None:
    api.delete_repo(repo)
    assert api.repo_exists(repo) is False
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo)
    api.delete_repo(repo, missing_ok=True)


def test_a_dataset_and_a_model_share_a_name(api: HfApi, repo: str, tmp_path: Path) -> None:
    api.create_repo(repo, repo_type="dataset")
    api.upload_file(
        path_or_fileobj=b"a,b\n", path_in_repo="d.csv", repo_id=repo, repo_type="dataset"
    )
    assert api.list_repo_files(repo, repo_type="dataset") == ["d.csv"]
    path = api.hf_hub_download(repo, "d.csv", repo_type="dataset", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"a,b\n"
    assert api.list_repo_files(repo) == ["README.md", "ink.safetensors", "sub/a b.txt"]
    assert [item.id for item in api.list_datasets(author="admin")] == [repo]


# Description


def test_model_info_describes_files_card_and_commit(api: HfApi, repo: str) -> None:
    info = api.model_info(repo, files_metadata=True)
    siblings = {file.rfilename: file for file in info.siblings or []}
    assert list(siblings) == ["README.md", "ink.safetensors", "sub/a b.txt"]
    lfs = siblings["ink.safetensors"].lfs
    assert lfs is not None
    # Both from other programs: sha256sum, and git hash-object.
    assert (lfs.size, lfs.sha256) == (
        3000,
        "38806d9b9b3a55e3bf20973561ea50b953a42abaa80fc6b6970e11742683f7de",
    )
    assert siblings["sub/a b.txt"].blob_id == "f3a34851d44d6b97c90fbb99dd3d18c261b9a237"
    assert (info.author, info.private, info.gated) == ("admin", False, False)
    assert info.card_data is not None
    assert info.card_data.license == "mit"
    assert info.tags == ["lora", "ink", "base_model:acme/base", "license:mit"]
    assert info.sha == api.list_repo_commits(repo)[0].commit_id


def test_expand_answers_only_what_is_named(hub: RunningHub, repo: str) -> None:
    address = f"{hub.url}/api/models/{repo}?expand=sha&expand%5B%5D=tags&expand=noSuchThing"
    assert set(httpx2.get(address).json()) == {"_id", "id", "sha", "tags"}


def test_tree_and_paths_info(api: HfApi, repo: str) -> None:
    tree = {item.path: item for item in api.list_repo_tree(repo, recursive=True, expand=True)}
    assert list(tree) == ["README.md", "ink.safetensors", "sub", "sub/a b.txt"]
    assert {type(item).__name__ for path, item in tree.items() if path == "sub"} == {"RepoFolder"}
    assert tree["sub/a b.txt"].last_commit.title == "first files"  # type: ignore[union-attr]
    assert [item.path for item in api.list_repo_tree(repo)] == [
        "README.md",
        "ink.safetensors",
        "sub",
    ]
    assert [item.path for item in api.list_repo_tree(repo, "sub")] == ["sub/a b.txt"]
    found = api.get_paths_info(repo, ["sub", "sub/a b.txt", "none"], expand=True)
    assert [item.path for item in found] == ["sub", "sub/a b.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "none"))


def test_a_long_tree_comes_in_pages(hub: RunningHub, api: HfApi, repo: str) -> None:
    operations = [CommitOperationAdd(f"many/{n:04}.txt", b"%d" % n) for n in range(120)]
    api.create_commit(repo, operations, commit_message="many")
    first = httpx2.get(f"{hub.url}/api/models/{repo}/tree/main/many?expand=true")
    assert len(first.json()) == 50
    assert first.headers["Link"].startswith(f"<{hub.url}/api/models/")
    paths = [item.path for item in api.list_repo_tree(repo, "many", expand=True)]
    assert paths == [f"many/{n:04}.txt" for n in range(120)]


def test_listing_filters_sorts_and_pages(api: HfApi) -> None:
    for number in range(3):
        name = f"admin/listed-{number}"
        api.create_repo(name)
        card = f"---\ntags: [listed, t{number % 2}]\n---\n".encode()
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=name)

    def ids(**query: object) -> list[str]:
        return [model.id for model in api.list_models(**query)]  # type: ignore[arg-type]

    newest_first = [f"admin/listed-{number}" for number in (2, 1, 0)]
    assert ids(search="LISTED-") == newest_first
    assert ids(filter=["listed", "t0"]) == ["admin/listed-2", "admin/listed-0"]
    assert ids(filter="listed", limit=2) == newest_first[:2]
    assert ids(search="listed-", sort="created_at") == newest_first
    assert ids(search="listed-", author="nobody") == []
    assert ids(search="%") == []
    full = next(iter(api.list_models(search="listed-1", full=True)))
    assert [file.rfilename for file in full.siblings or []] == ["README.md"]


def test_pages_of_a_listing_are_absolute_and_complete(hub: RunningHub, api: HfApi) -> None:
    for number in range(5):
        api.create_repo(f"admin/paged-{number}")
    address, seen = f"{hub.url}/api/models?search=paged-&limit=2&sort=createdAt", []
    while address:
        answer = httpx2.get(address)
        seen.append([item["id"] for item in answer.json()])
        address = answer.links.get("next", {}).get("url", "")
    assert seen == [
        ["admin/paged-4", "admin/paged-3"],
        ["admin/paged-2", "admin/paged-1"],
        ["admin/paged-0"],
    ]


# Commits


def test_a_folder_is_one_commit_and_again_none(api: HfApi, repo: str, tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/ü.bin").write_bytes(os.urandom(1_500_000))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "README.md").write_text("---\ntags: [a]\n---\n# Folder\n")
    commit = api.upload_folder(repo_id=repo, folder_path=tmp_path, commit_message="folder")
    assert api.list_repo_commits(repo)[0].commit_id == commit.oid
    again = api.upload_folder(repo_id=repo, folder_path=tmp_path)
    assert again.oid == commit.oid
    path = api.hf_hub_download(repo, "deep/er/ü.bin", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == (tmp_path / "deep/er/ü.bin").read_bytes()
    empty = api.hf_hub_download(repo, "empty.txt", cache_dir=tmp_path / "cache")
    assert Path(empty).read_bytes() == b""


def test_delete_copy_and_replace_in_one_commit(api: HfApi, repo: str, tmp_path: Path) -> None:
    api.create_commit(
        repo,
        [
            CommitOperationDelete("sub/", is_folder=True),
            CommitOperationCopy("ink.safetensors", "copy.safetensors"),
            CommitOperationAdd("README.md", b"---\ntags: [new]\n---\n"),
        ],
        commit_message="three things",
        commit_description="said at length",
    )
    assert api.list_repo_files(repo) == ["README.md", "copy.safetensors", "ink.safetensors"]
    copy = api.hf_hub_download(repo, "copy.safetensors", cache_dir=tmp_path)
    assert Path(copy).read_bytes() == b"ink" * 1000
    newest = api.list_repo_commits(repo)[0]
    assert (newest.title, newest.message) == ("three things", "said at length")
    api.delete_file("copy.safetensors", repo)
    assert api.list_repo_files(repo) == ["README.md", "ink.safetensors"]


def test_a_commit_is_all_or_nothing(api: HfApi, repo: str) -> None:
    before = api.model_info(repo).sha
    with pytest.raises(HfHubHTTPError):
        api.create_commit(
            repo,
            [CommitOperationAdd("new.txt", b"x"), CommitOperationDelete("none.txt")],
            commit_message="half",
        )
    assert api.model_info(repo).sha == before
    assert api.file_exists(repo, "new.txt") is False


def test_a_commit_on_an_old_parent_is_refused(api: HfApi, repo: str) -> None:
    old = api.model_info(repo).sha
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=repo, parent_commit=old)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=repo, parent_commit=old)


@pytest.mark.parametrize("path", ["con.txt", "a//b", "a:b", "a\u202eb", "x/.git/config"])
def test_a_path_that_some_system_cannot_have_is_refused(
    hub: RunningHub, api: HfApi, repo: str, path: str
) -> None:
    line = {"key": "file", "value": {"path": path, "content": "eA==", "encoding": "base64"}}
    answer = _commit(hub, repo, {"key": "header", "value": {"summary": "s"}}, line)
    assert answer.status_code == 422
    assert answer.headers["X-Error-Code"] == "BadPath"
    assert len(api.list_repo_files(repo)) == 3


def test_front_matter_that_is_not_yaml_is_refused(api: HfApi, repo: str) -> None:
    with pytest.raises(ValueError, match="Invalid YAML front matter: line 3: "):
        api.upload_file(
            path_or_fileobj=b"---\ntags: [a\n---\n", path_in_repo="README.md", repo_id=repo
        )


def test_a_card_is_validated_before_anything_is_sent(api: HfApi, repo: str) -> None:
    before = api.list_repo_commits(repo)
    with pytest.raises(ValueError, match='"model-index" has to be a list'):
        api.upload_file(
            path_or_fileobj=b"---\nmodel-index: foo\n---\n", path_in_repo="README.md", repo_id=repo
        )
    assert api.list_repo_commits(repo) == before
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# plain\n", path_in_repo="README.md", repo_id=repo)


def test_what_this_hub_does_not_have_is_501(hub: RunningHub, api: HfApi, repo: str) -> None:
    with pytest.raises(HfHubHTTPError, match="501"):
        list(api.list_papers(query="lora"))
    assert list(api.list_spaces()) == []
    with pytest.raises(HfHubHTTPError, match="501"):
        api.create_repo("admin/space", repo_type="space", space_sdk="static")
    answer = httpx2.get(f"{hub.url}/api/papers/2311.12983")
    assert (answer.status_code, answer.headers["X-Error-Code"]) == (501, "NotImplementedHere")
    assert httpx2.get(f"{hub.url}/api/agent-harnesses").json() == {
        "standardEnvVars": [],
        "harnesses": {},
    }


def test_the_headers_of_all_shards_come_in_one_answer(api: HfApi, repo: str) -> None:
    def shard(name: str) -> bytes:
        header = {
            name: {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]},
            "__metadata__": {"format": "pt"},
        }
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + bytes(4)

    files = {"a": "m-1.safetensors", "b": "m-2.safetensors"}
    index = {"metadata": {"total_size": 8}, "weight_map": files}
    operations = [CommitOperationAdd(f"x/{file}", shard(name)) for name, file in files.items()]
    broken = {"weight_map": {"a": "../ink.safetensors"}}
    torn = {"weight_map": {"a": "ink.safetensors"}}
    odd = {"weight_map": {"a": "odd.safetensors"}}
    operations.append(CommitOperationAdd("odd.safetensors", b"\x02" + bytes(7) + b"no"))
    for name, content in (
        ("odd.json", odd),
        ("x/m.index.json", index),
        ("broken.json", broken),
        ("torn.json", torn),
    ):
        operations.append(CommitOperationAdd(name, json.dumps(content).encode()))
    api.create_commit(repo, operations, commit_message="shards")
    found = api.get_sharded_safetensors_metadata(repo, filename="x/m.index.json")
    assert (found.metadata, found.sharded, dict(found.weight_map)) == (
        {"total_size": 8},
        True,
        files,
    )
    one = found.files_metadata["m-2.safetensors"]
    assert (one.metadata, one.tensors["b"].shape, one.tensors["b"].data_offsets) == (
        {"format": "pt"},
        [2],
        (0, 4),
    )
    with pytest.raises(EntryNotFoundError):
        api.get_sharded_safetensors_metadata(repo)
    for wrong, why in (
        ("broken.json", "names no files"),
        ("sub/a b.txt", "is not JSON"),
        ("odd.json", "odd.safetensors: the header does not begin"),
        ("torn.json", "ink.safetensors: the header claims"),
    ):
        with pytest.raises(HfHubHTTPError, match=why):
            api.get_sharded_safetensors_metadata(repo, filename=wrong)


# Branches and tags


def test_branches_and_tags(api: HfApi, repo: str, tmp_path: Path) -> None:
    first = api.model_info(repo).sha
    api.create_branch(repo, branch="feature/a")
    api.create_tag(repo, tag="v1", revision=str(first)[:7])
    api.upload_file(
        path_or_fileobj=b"2", path_in_repo="on-branch.txt", repo_id=repo, revision="feature/a"
    )
    assert "on-branch.txt" in api.list_repo_files(repo, revision="feature/a")
    assert "on-branch.txt" not in api.list_repo_files(repo)
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["feature/a", "main"]
    assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/v1", first)]
    path = api.hf_hub_download(
        repo, "on-branch.txt", revision="refs/heads/feature/a", cache_dir=tmp_path
    )
    assert Path(path).read_bytes() == b"2"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(repo, branch="feature/a")
    api.create_branch(repo, branch="feature/a", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(repo, tag="v2", revision="nothing")
    api.delete_branch(repo, branch="feature/a")
    api.delete_tag(repo, tag="v1")
    assert api.revision_exists(repo, "feature/a") is False
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="v1")


# Downloads


def test_a_missing_file_carries_the_commit(
    hub: RunningHub, api: HfApi, repo: str, tmp_path: Path
) -> None:
    answer = httpx2.head(f"{hub.url}/{repo}/resolve/main/none.bin")
    assert answer.status_code == 404
    assert answer.headers["X-Error-Code"] == "EntryNotFound"
    assert answer.headers["X-Repo-Commit"] == api.model_info(repo).sha
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(repo, "none.bin", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(repo, "README.md", revision="none", cache_dir=tmp_path)


def test_a_snapshot_has_every_file(api: HfApi, repo: str, tmp_path: Path) -> None:
    folder = Path(api.snapshot_download(repo, cache_dir=tmp_path))
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert files == ["README.md", "ink.safetensors", "sub/a b.txt"]
    assert folder.name == api.model_info(repo).sha
    api.upload_file(path_or_fileobj=b"new", path_in_repo="sub/a b.txt", repo_id=repo)
    newer = Path(api.snapshot_download(repo, cache_dir=tmp_path))
    assert (newer / "sub/a b.txt").read_bytes() == b"new"
    assert (folder / "sub/a b.txt").read_bytes() == b"text"


def test_head_has_what_clients_cache_by(hub: RunningHub, api: HfApi, repo: str) -> None:
    answer = httpx2.head(f"{hub.url}/{repo}/resolve/main/ink.safetensors")
    lfs = (api.model_info(repo, files_metadata=True).siblings or [])[1].lfs
    assert lfs is not None
    assert answer.status_code == 200
    assert answer.headers["Content-Length"] == answer.headers["X-Linked-Size"] == "3000"
    assert answer.headers["ETag"] == answer.headers["X-Linked-ETag"] == f'"{lfs.sha256}"'
    assert answer.headers["X-Repo-Commit"] == api.model_info(repo).sha
    assert answer.headers["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize(
    ("asked", "status", "content_range", "body"),
    [
        ("bytes=0-3", 206, "bytes 0-3/3000", b"inki"),
        ("bytes=2998-", 206, "bytes 2998-2999/3000", b"nk"),
        ("bytes=-4", 206, "bytes 2996-2999/3000", b"kink"),
        ("bytes=2999-9999", 206, "bytes 2999-2999/3000", b"k"),
        ("bytes=3000-", 416, "bytes */3000", b""),
        ("bytes=0-1,5-6", 200, None, b"ink" * 1000),
        ("bytes=5-2", 200, None, b"ink" * 1000),
        ("lines=1-2", 200, None, b"ink" * 1000),
    ],
)
def test_one_range_is_served(
    hub: RunningHub,
    ranged: str,
    asked: str,
    status: int,
    content_range: str | None,
    body: bytes,
) -> None:
    answer = httpx2.get(f"{hub.url}/{ranged}/resolve/main/i.safetensors", headers={"Range": asked})
    assert answer.status_code == status
    assert answer.headers.get("Content-Range") == content_range
    assert answer.content == body


@pytest.fixture(scope="module")
def ranged(hub: RunningHub) -> str:
    api = HfApi(endpoint=hub.url, token=hub.admin_token)
    api.create_repo("admin/ranged")
    api.upload_file(
        path_or_fileobj=b"ink" * 1000, path_in_repo="i.safetensors", repo_id="admin/ranged"
    )
    return "admin/ranged"


def test_a_range_of_other_bytes_is_the_whole_file(hub: RunningHub, ranged: str) -> None:
    address = f"{hub.url}/{ranged}/resolve/main/i.safetensors"
    headers = {"Range": "bytes=0-3", "If-Range": '"other"'}
    assert httpx2.get(address, headers=headers).status_code == 200
    headers["If-Range"] = httpx2.head(address).headers["ETag"]
    assert httpx2.get(address, headers=headers).status_code == 206


def test_an_interrupted_download_goes_on(hub: RunningHub, api: HfApi, tmp_path: Path) -> None:
    data = os.urandom(1_000_000)
    api.create_repo("admin/resumed")
    api.upload_file(path_or_fileobj=data, path_in_repo="r.bin", repo_id="admin/resumed")
    etag = httpx2.head(f"{hub.url}/admin/resumed/resolve/main/r.bin").headers["ETag"].strip('"')
    blobs = tmp_path / "models--admin--resumed/blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{etag}.incomplete"
    part.write_bytes(data[:400_000])
    path = api.hf_hub_download("admin/resumed", "r.bin", cache_dir=tmp_path)
    assert Path(path).read_bytes() == data


# LFS and limits


def test_a_large_file_goes_over_lfs(
    hub: RunningHub, api: HfApi, repo: str, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "large.safetensors").write_bytes(os.urandom(5 * MiB + 3))
    (tmp_path / "small.txt").write_text("small")
    code = f"""
from huggingface_hub import HfApi
print(HfApi().upload_folder(repo_id={repo!r}, folder_path={str(tmp_path)!r},
                            allow_patterns=["*.safetensors", "*.txt"]).oid)
"""
    done = client(*python(code), HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == api.model_info(repo).sha
    path = api.hf_hub_download(repo, "large.safetensors", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == (tmp_path / "large.safetensors").read_bytes()


def test_a_digest_is_no_right_to_the_bytes(
    hub: RunningHub, api: HfApi, people: dict[str, str]
) -> None:
    """Somebody else's private blob has to be sent by whoever wants to commit it."""
    secret = os.urandom(1000)
    api.create_repo("admin/vault", private=True)
    api.upload_file(path_or_fileobj=secret, path_in_repo="s.safetensors", repo_id="admin/vault")
    entry = (api.model_info("admin/vault", files_metadata=True).siblings or [])[0]
    assert entry.lfs is not None
    other = people["thief"]
    HfApi(endpoint=hub.url, token=other).create_repo("thief/loot")
    objects = {"operation": "upload", "objects": [{"oid": entry.lfs.sha256, "size": 1000}]}
    headers = {"Authorization": f"Bearer {other}"}
    address = f"{hub.url}/thief/loot.git/info/lfs/objects"
    answer = httpx2.post(f"{address}/batch", json=objects, headers=headers).json()["objects"][0]
    assert set(answer["actions"]) == {"upload", "verify"}
    pointer = {"path": "s.safetensors", "algo": "sha256", "oid": entry.lfs.sha256, "size": 1000}
    lines = {"key": "header", "value": {"summary": "s"}}, {"key": "lfsFile", "value": pointer}
    refused = _commit(hub, "thief/loot", *lines, token=other)
    assert refused.status_code == 400
    assert "does not exist" in refused.json()["error"]
    assert httpx2.get(f"{address}/{entry.lfs.sha256}", headers=headers).status_code == 404
    wrong = httpx2.put(answer["actions"]["upload"]["href"], content=os.urandom(1000))
    assert wrong.status_code == 422
    assert _commit(hub, "thief/loot", *lines, token=other).status_code == 400
    httpx2.put(answer["actions"]["upload"]["href"], content=secret).raise_for_status()
    assert _commit(hub, "thief/loot", *lines, token=other).status_code == 200


def test_an_upload_address_is_for_one_object(hub: RunningHub, repo: str) -> None:
    objects = {"operation": "upload", "objects": [{"oid": "a" * 64, "size": 3}]}
    base = f"{hub.url}/{repo}.git/info/lfs/objects"
    answer = httpx2.post(f"{base}/batch", json=objects, headers=hub.auth).json()
    href = answer["objects"][0]["actions"]["upload"]["href"]
    assert httpx2.put(href.replace("a" * 64, "b" * 64), content=b"abc").status_code == 401
    assert httpx2.put(href[:-1] + "!", content=b"abc").status_code == 401
    assert httpx2.put(href, content=b"abcd").status_code == 400
    assert httpx2.put(href, content=b"abc").status_code == 422


def test_a_regular_file_of_many_mebibytes_in_a_commit(
    hub: RunningHub, api: HfApi, repo: str, tmp_path: Path
) -> None:
    """Clients that ignore what preupload says, and a line far longer than any buffer."""
    data = os.urandom(7 * MiB + 1)
    operation = CommitOperationAdd("inline.bin", data)
    value = {"content": operation.b64content().decode(), "path": "inline.bin", "encoding": "base64"}
    header = {"key": "header", "value": {"summary": "inline"}}
    answer = _commit(hub, repo, header, {"key": "file", "value": value})
    assert answer.status_code == 200, answer.text
    path = api.hf_hub_download(repo, "inline.bin", cache_dir=tmp_path)
    assert Path(path).read_bytes() == data


def test_a_preupload_without_rights_is_refused(
    hub: RunningHub, repo: str, people: dict[str, str]
) -> None:
    other = people["reader"]
    body = {"files": [{"path": "x", "size": 1, "sample": "eA=="}]}
    answer = httpx2.post(
        f"{hub.url}/api/models/{repo}/preupload/main",
        json=body,
        headers={"Authorization": f"Bearer {other}"},
    )
    assert answer.status_code == 403
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(endpoint=hub.url, token=other).upload_file(
            path_or_fileobj=b"x", path_in_repo="x", repo_id=repo
        )


def test_a_request_that_makes_no_sense_is_400_or_422(
    hub: RunningHub, api: HfApi, repo: str
) -> None:
    with pytest.raises((BadRequestError, HfHubHTTPError), match="4(00|22)"):
        api.create_branch(repo, branch="a..b")
    answer = httpx2.post(f"{hub.url}/api/repos/create", json={"name": 7}, headers=hub.auth)
    assert answer.status_code == 422
    assert "name" in answer.headers["X-Error-Message"]
    assert answer.json()["error"] == answer.headers["X-Error-Message"]


# The hf command


def test_the_hf_command_uploads_and_downloads(client: Client, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/README.md").write_text("---\ntags: [hf]\n---\n")
    (tmp_path / "in/a.safetensors").write_bytes(os.urandom(1_900_000))
    who = client(*hf("auth", "whoami"))
    assert "admin" in who.stdout, who.stderr
    up = client(*hf("upload", "admin/by-hf", str(tmp_path / "in"), "--revision", "dev"))
    assert up.returncode == 0, up.stderr
    down = client(
        *hf("download", "admin/by-hf", "--revision", "dev", "--local-dir", str(tmp_path / "out")),
        token=None,
    )
    assert down.returncode == 0, down.stderr
    for name in ("README.md", "a.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


def test_the_hf_command_names_a_wrong_token(client: Client) -> None:
    done = client(*hf("auth", "whoami"), token="graft_wrong")
    assert done.returncode != 0
    assert "Invalid user token" in done.stdout + done.stderr


def test_curl_fetches_a_range(hub: RunningHub, ranged: str, client: Client) -> None:
    address = f"{hub.url}/{ranged}/resolve/main/i.safetensors"
    assert client("curl", "-sfL", "-r", "3-8", address, token=None).stdout == "inkink"


def _commit(
    hub: RunningHub, repo: str, *lines: object, token: str | None = None
) -> httpx2.Response:
    return httpx2.post(
        f"{hub.url}/api/models/{repo}/commit/main",
        content="\n".join(json.dumps(line) for line in lines).encode(),
        headers={"Authorization": f"Bearer {token or hub.admin_token}"},
        timeout=60,
    )


# PostgreSQL


def test_the_protocol_on_postgresql(tmp_path: Path, postgres_url: str) -> None:
    """The statements of this façade alone: listing in every order, trees, history, odd text."""
    with running_hub(tmp_path, database_url=postgres_url, workers=0) as hub:
        api = HfApi(endpoint=hub.url, token=hub.admin_token)
        for number in range(3):
            api.create_repo(f"admin/p{number}")
        operations = [CommitOperationAdd(name, name.encode()) for name in ("b", "B/x", "a", "Z")]
        api.create_commit("admin/p1", operations, commit_message="names in byte order")
        assert api.list_repo_files("admin/p1") == ["B/x", "Z", "a", "b"]
        assert [commit.title for commit in api.list_repo_commits("admin/p1")] == [
            "names in byte order",
            "initial commit",
        ]
        assert [item.path for item in api.list_repo_tree("admin/p1", "B")] == ["B/x"]
        for order in ("lastModified", "createdAt", "downloads", "likes", "trendingScore", "other"):
            address, seen = f"{hub.url}/api/models?limit=2&sort={order}", []
            while address:
                answer = httpx2.get(address).raise_for_status()
                seen += [item["id"] for item in answer.json()]
                address = answer.links.get("next", {}).get("url", "")
            assert sorted(seen) == ["admin/p0", "admin/p1", "admin/p2"], order
        for odd in ("?search=%00", "?author=%00", "/admin/p1/tree/main/%00", "/admin/p%00"):
            assert 400 <= httpx2.get(f"{hub.url}/api/models{odd}").status_code < 500, odd
        api.move_repo("admin/p1", "admin/p9")
        assert api.model_info("admin/p1").id == "admin/p9"
        path = api.hf_hub_download("admin/p9", "a", cache_dir=tmp_path / "cache")
        assert Path(path).read_bytes() == b"a"
