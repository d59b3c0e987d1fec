"""Unmodified huggingface_hub: gated repos, pull requests, discussions, likes, history, copies."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DiscussionComment,
    DiscussionStatusChange,
    HfApi,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hub.context import open_hub
from tests.fixtures.server import RunningHub, running_hub, settings_of
from tests.hub.conftest import make_user


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def tokens(folder: Path) -> dict[str, str]:
    with open_hub(settings_of(folder)) as hub:
        return {name: make_user(hub, name)[1] for name in ("ada", "ben")}


@pytest.fixture(scope="module")
def hub(folder: Path, tokens: dict[str, str]) -> Iterator[RunningHub]:
    with running_hub(folder) as hub:
        yield hub


@pytest.fixture
def ada(hub: RunningHub, tokens: dict[str, str]) -> HfApi:
    return HfApi(endpoint=hub.url, token=tokens["ada"])


@pytest.fixture
def ben(hub: RunningHub, tokens: dict[str, str]) -> HfApi:
    return HfApi(endpoint=hub.url, token=tokens["ben"])


@pytest.fixture
def nobody(hub: RunningHub) -> HfApi:
    return HfApi(endpoint=hub.url, token=False)


@pytest.fixture
def repo(ada: HfApi, request: pytest.FixtureRequest) -> str:
    name = f"ada/r{zlib.crc32(request.node.name.encode()):08x}"
    ada.create_repo(name)
    put(ada, name, "ink.safetensors", b"ink" * 100)
    return name


def put(api: HfApi, repo: str, path: str, content: bytes, revision: str = "main") -> str:
    done = api.upload_file(
        path_or_fileobj=content, path_in_repo=path, repo_id=repo, revision=revision
    )
    return done.oid


def read(api: HfApi, repo: str, path: str, cache: Path, revision: str = "main") -> bytes:
    return Path(
        api.hf_hub_download(repo, path, revision=revision, cache_dir=cache / str(api.token))
    ).read_bytes()


# Gated repos


def test_a_gated_repo_is_seen_by_all_and_read_by_those_let_in(
    ada: HfApi, ben: HfApi, nobody: HfApi, repo: str, tmp_path: Path
) -> None:
    ada.update_repo_settings(repo, gated="manual")
    assert nobody.model_info(repo).gated == "manual"
    assert nobody.list_repo_files(repo) == ["ink.safetensors"]
    for stranger in (nobody, ben):
        with pytest.raises(GatedRepoError):
            read(stranger, repo, "ink.safetensors", tmp_path)
        with pytest.raises(GatedRepoError):
            stranger.auth_check(repo)
    assert read(ada, repo, "ink.safetensors", tmp_path) == b"ink" * 100
    asked = _ask(ben, repo)
    assert asked.json() == {"status": "pending"}
    assert [request.username for request in ada.list_pending_access_requests(repo)] == ["ben"]
    with pytest.raises(GatedRepoError):
        read(ben, repo, "ink.safetensors", tmp_path)
    ada.accept_access_request(repo, "ben")
    ben.auth_check(repo)
    assert read(ben, repo, "ink.safetensors", tmp_path) == b"ink" * 100
    ada.reject_access_request(repo, "ben", rejection_reason="no more")
    with pytest.raises(GatedRepoError):
        read(ben, repo, "ink.safetensors", tmp_path / "again")
    assert _ask(ben, repo).json() == {"status": "rejected"}
    ada.update_repo_settings(repo, gated=False)
    assert read(nobody, repo, "ink.safetensors", tmp_path) == b"ink" * 100


def test_an_automatic_gate_lets_in_who_asks(ada: HfApi, ben: HfApi, repo: str) -> None:
    with pytest.raises(HfHubHTTPError, match="not gated"):
        ada.grant_access(repo, "ben")
    ada.update_repo_settings(repo, gated="auto")
    with pytest.raises(GatedRepoError):
        ben.auth_check(repo)
    assert _ask(ben, repo).json() == {"status": "accepted"}
    ben.auth_check(repo)
    (accepted,) = ada.list_accepted_access_requests(repo)
    ada.reject_access_request(repo, request_id=accepted.request_id, rejection_reason=None)
    with pytest.raises(GatedRepoError):
        ben.auth_check(repo)
    with pytest.raises(HfHubHTTPError, match="403"):
        list(ben.list_accepted_access_requests(repo))


def test_the_digest_of_a_gated_file_is_no_way_to_its_bytes(
    hub: RunningHub, ada: HfApi, ben: HfApi, repo: str
) -> None:
    ada.update_repo_settings(repo, gated="manual")
    put(ada, repo, "rare.safetensors", b"nowhere else")
    (file,) = ben.get_paths_info(repo, "rare.safetensors")
    assert file.lfs is not None  # type: ignore[union-attr]
    address = f"{hub.url}/{repo}.git/info/lfs/objects/{file.lfs.sha256}"  # type: ignore[union-attr]
    assert httpx2.get(address, headers=_bearer(ben)).status_code == 404
    assert httpx2.get(address, headers=_bearer(ada)).status_code == 200
    recipe = {
        "schema": 1,
        "kind": "resize",
        "inputs": [{"ref": f"{repo}:rare.safetensors"}],
        "rank": {"fixed": 1},
    }
    refused = httpx2.post(f"{hub.url}/api/reports", json={"recipe": recipe}, headers=_bearer(ben))
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "inputs[0].ref")
    assert "restricted" in refused.json()["error"]["message"]


def test_the_page_of_a_gated_repo_has_a_button(
    hub: RunningHub, ada: HfApi, ben: HfApi, repo: str
) -> None:
    ada.update_repo_settings(repo, gated="manual")
    put(ada, repo, "notes.txt", b"only for some")
    page, text = f"{hub.url}/{repo}", f"{hub.url}/{repo}/blob/main/notes.txt"
    assert "Sign in" in httpx2.get(page).text
    assert "Ask for access" in httpx2.get(page, headers=_bearer(ben)).text
    assert "only for some" not in httpx2.get(text, headers=_bearer(ben)).text
    assert "only for some" in httpx2.get(text, headers=_bearer(ada)).text
    done = httpx2.post(f"{page}/ask-access", headers=_bearer(ben))
    assert (done.status_code, done.headers["Location"]) == (303, f"/{repo}")
    assert "have not answered yet" in httpx2.get(page, headers=_bearer(ben)).text


# Pull requests and discussions


def test_a_stranger_proposes_and_the_owner_merges(
    ada: HfApi, ben: HfApi, repo: str, tmp_path: Path
) -> None:
    done = ben.create_commit(
        repo,
        [CommitOperationAdd("fix.txt", b"fixed")],
        commit_message="a fix",
        commit_description="because",
        create_pr=True,
    )
    assert (done.pr_num, done.pr_revision) == (1, "refs/pr/1")
    assert ada.list_repo_files(repo) == ["ink.safetensors"]
    assert read(ada, repo, "fix.txt", tmp_path, "refs/pr/1") == b"fixed"
    refs = ada.list_repo_refs(repo, include_pull_requests=True)
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests or []] == [
        ("refs/pr/1", done.oid)
    ]
    put(ben, repo, "more.txt", b"more", "refs/pr/1")
    with pytest.raises(HfHubHTTPError, match="403"):
        ben.merge_pull_request(repo, 1)
    with pytest.raises(HfHubHTTPError, match="403"):
        put(ben, repo, "more.txt", b"more")
    put(ada, repo, "meanwhile.txt", b"other")
    ada.merge_pull_request(repo, 1)
    files = ["fix.txt", "ink.safetensors", "meanwhile.txt", "more.txt"]
    assert ada.list_repo_files(repo) == files
    assert ada.list_repo_commits(repo)[0].title == "a fix (#1)"
    details = ada.get_discussion_details(repo, 1)
    assert (details.status, details.merge_commit_oid) == ("merged", ada.model_info(repo).sha)
    assert [event.type for event in details.events] == [
        "comment",
        "commit",
        "commit",
        "status-change",
    ]
    with pytest.raises(HfHubHTTPError, match="is merged"):
        ada.merge_pull_request(repo, 1)


def test_a_pull_request_that_conflicts_names_the_file(ada: HfApi, ben: HfApi, repo: str) -> None:
    put(ada, repo, "both.txt", b"0")
    pull = ben.create_pull_request(repo, "mine", description="better")
    assert (pull.status, pull.target_branch) == ("draft", "refs/heads/main")
    put(ben, repo, "both.txt", b"ben", pull.git_reference or "")
    put(ada, repo, "both.txt", b"ada")
    assert ada.get_discussion_details(repo, pull.num).conflicting_files == ["both.txt"]
    head = ada.model_info(repo).sha
    with pytest.raises(HfHubHTTPError, match=r"both\.txt was changed in main too"):
        ada.merge_pull_request(repo, pull.num)
    assert ada.model_info(repo).sha == head


def test_a_pull_request_whose_branch_is_gone_can_still_be_read(
    ada: HfApi, ben: HfApi, repo: str
) -> None:
    ada.create_branch(repo, branch="side")
    ben.upload_file(
        repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"a", revision="side", create_pr=True
    )
    ada.delete_branch(repo, branch="side")
    details = ben.get_discussion_details(repo, 1)
    assert (details.status, details.target_branch) == ("open", "refs/heads/side")
    assert details.conflicting_files == []


def test_a_folder_becomes_a_pull_request(ada: HfApi, ben: HfApi, repo: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for n in range(3):
        (tmp_path / "a" / f"{n}.txt").write_text(str(n))
    done = ben.upload_folder(repo_id=repo, folder_path=tmp_path, create_pr=True)
    assert done.pr_revision == "refs/pr/1"
    assert ada.list_repo_files(repo, revision="refs/pr/1") == [
        "a/0.txt",
        "a/1.txt",
        "a/2.txt",
        "ink.safetensors",
    ]


def test_a_discussion_is_led_by_its_author_and_the_owner(ada: HfApi, ben: HfApi, repo: str) -> None:
    made = ben.create_discussion(repo, "What  rank?", description="please")
    said = ada.comment_discussion(repo, made.num, "sixteen")
    ben_said = ben.comment_discussion(repo, made.num, "thanks")
    with pytest.raises(HfHubHTTPError, match="403"):
        ben.edit_discussion_comment(repo, made.num, said.id, "eight")
    assert ada.edit_discussion_comment(repo, made.num, said.id, "32").edited
    with pytest.warns(UserWarning, match="cannot be retrieved"):
        ada.hide_discussion_comment(repo, made.num, ben_said.id)
    ben.rename_discussion(repo, made.num, "Which rank?")
    ada.change_discussion_status(repo, made.num, "closed", comment="answered")
    details = ben.get_discussion_details(repo, made.num)
    assert (details.title, details.status) == ("Which rank?", "closed")
    texts = [event.content for event in details.events if isinstance(event, DiscussionComment)]
    assert texts == ["please", "32", "", "answered"]
    assert isinstance(details.events[-1], DiscussionStatusChange)
    assert [found.num for found in ada.get_repo_discussions(repo, author="BEN")] == [made.num]
    assert [*ada.get_repo_discussions(repo, discussion_status="open")] == []
    assert [*ada.get_repo_discussions(repo, discussion_type="pull_request")] == []


def test_discussions_of_pickled_weights_are_not_listed(ada: HfApi, repo: str) -> None:
    put(ada, repo, "pytorch_model.bin", b"weights")
    assert [*ada.get_repo_discussions(repo)] == []
    ada.delete_file("ink.safetensors", repo)
    with pytest.raises(HfHubHTTPError, match="501"):
        list(ada.get_repo_discussions(repo))


def test_discussions_of_a_private_repo_are_private(ada: HfApi, ben: HfApi, repo: str) -> None:
    made = ada.create_discussion(repo, "secret")
    ada.update_repo_settings(repo, private=True)
    for call in (
        lambda: list(ben.get_repo_discussions(repo)),
        lambda: ben.get_discussion_details(repo, made.num),
        lambda: ben.comment_discussion(repo, made.num, "hello"),
        lambda: ben.create_pull_request(repo, "mine"),
    ):
        with pytest.raises(RepositoryNotFoundError):
            call()


# History


def test_squash_leaves_one_commit_and_the_same_files(ada: HfApi, repo: str) -> None:
    old = put(ada, repo, "a.txt", b"1")
    ada.create_branch(repo, branch="v1")
    put(ada, repo, "a.txt", b"2")
    files = {item.path: item.blob_id for item in ada.list_repo_tree(repo)}  # type: ignore[union-attr]
    ada.super_squash_history(repo, commit_message="one")
    (only,) = ada.list_repo_commits(repo)
    assert (only.title, only.commit_id) == ("one", ada.model_info(repo).sha)
    assert {item.path: item.blob_id for item in ada.list_repo_tree(repo)} == files  # type: ignore[union-attr]
    assert ada.list_repo_commits(repo, revision="v1")[0].commit_id == old
    with pytest.raises(RevisionNotFoundError):
        ada.super_squash_history(repo, branch="none")


def test_revert_takes_back_one_commit(
    hub: RunningHub, ada: HfApi, repo: str, tmp_path: Path
) -> None:
    put(ada, repo, "a.txt", b"1")
    wrong = ada.create_commit(
        repo,
        [
            CommitOperationAdd("a.txt", b"2"),
            CommitOperationAdd("b.txt", b"new"),
            CommitOperationDelete("ink.safetensors"),
        ],
        commit_message="wrong",
    ).oid
    put(ada, repo, "c.txt", b"later")

    def revert(revision: str) -> httpx2.Response:
        address = f"{hub.url}/api/models/{repo}/revert/{revision}"
        return httpx2.post(address, json={}, headers=_bearer(ada))

    done = revert(wrong[:10])
    assert done.json()["commitOid"] == ada.model_info(repo).sha
    assert ada.list_repo_files(repo) == ["a.txt", "c.txt", "ink.safetensors"]
    assert read(ada, repo, "a.txt", tmp_path) == b"1"
    put(ada, repo, "a.txt", b"3")
    refused = revert(wrong)
    assert (refused.status_code, refused.headers["X-Error-Code"]) == (409, "Conflict")
    assert "a.txt was changed again" in refused.json()["error"]
    assert revert(ada.list_repo_commits(repo)[-1].commit_id).status_code == 400


def test_lfs_files_leave_the_whole_history(ada: HfApi, repo: str, tmp_path: Path) -> None:
    old = put(ada, repo, "big.safetensors", b"secret")
    ada.create_tag(repo, tag="v1")
    ada.create_branch(repo, branch="side")
    ada.delete_file("big.safetensors", repo)
    put(ada, repo, "after.txt", b"kept")
    first = ada.list_repo_commits(repo)[-1].commit_id
    titles = [commit.title for commit in ada.list_repo_commits(repo)]
    files = {file.filename: file for file in ada.list_lfs_files(repo)}
    assert set(files) == {"big.safetensors", "ink.safetensors"}
    assert (files["big.safetensors"].size, files["big.safetensors"].ref) == (6, "refs/heads/side")
    ada.permanently_delete_lfs_files(repo, [files["big.safetensors"]])
    assert [file.filename for file in ada.list_lfs_files(repo)] == ["ink.safetensors"]
    for revision in ("v1", "side"):
        with pytest.raises(EntryNotFoundError):
            read(ada, repo, "big.safetensors", tmp_path, revision)
    assert ada.revision_exists(repo, old) is False
    assert [commit.title for commit in ada.list_repo_commits(repo)] == titles
    assert ada.list_repo_commits(repo)[-1].commit_id == first
    assert read(ada, repo, "after.txt", tmp_path) == b"kept"
    assert read(ada, repo, "ink.safetensors", tmp_path, "v1") == b"ink" * 100


def test_a_copy_of_a_repo_has_its_files_and_another_history(
    ada: HfApi, ben: HfApi, repo: str, tmp_path: Path
) -> None:
    copy = ben.duplicate_repo(repo, "ben/copied-ink")
    assert copy.repo_id == "ben/copied-ink"
    assert read(ben, "ben/copied-ink", "ink.safetensors", tmp_path) == b"ink" * 100
    titles = [commit.title for commit in ben.list_repo_commits("ben/copied-ink")]
    assert titles == [f"Duplicate from {repo}", "initial commit"]
    ada.delete_repo(repo)
    assert read(ben, "ben/copied-ink", "ink.safetensors", tmp_path / "2") == b"ink" * 100
    with pytest.raises(HfHubHTTPError, match="409"):
        ben.duplicate_repo("ben/copied-ink", "ben/copied-ink")
    with pytest.raises(HfHubHTTPError, match="403"):
        ben.duplicate_repo("ben/copied-ink", "ada/copied-ink")


def test_a_gated_repo_is_not_copied_around_its_gate(ada: HfApi, ben: HfApi, repo: str) -> None:
    ada.update_repo_settings(repo, gated="manual")
    with pytest.raises(GatedRepoError):
        ben.duplicate_repo(repo, "ben/around-the-gate")
    assert ben.repo_exists("ben/around-the-gate") is False


# Likes, people, lists


def test_likes_are_counted_once_and_taken_back(
    hub: RunningHub, ada: HfApi, ben: HfApi, repo: str
) -> None:
    for _ in range(2):
        answer = httpx2.post(f"{hub.url}/api/models/{repo}/like", headers=_bearer(ben))
        assert answer.status_code == 200
    assert ada.model_info(repo).likes == 1
    assert [user.username for user in ada.list_repo_likers(repo)] == ["ben"]
    assert repo in ada.list_liked_repos("ben").models
    ada.update_repo_settings(repo, private=True)
    assert repo not in ben.list_liked_repos("ben").models
    ada.update_repo_settings(repo, private=False)
    ben.unlike(repo)
    assert ada.model_info(repo).likes == 0


def test_overviews_count_what_the_viewer_may_see(
    ada: HfApi, nobody: HfApi, repo: str, tmp_path: Path
) -> None:
    def counts() -> list[int]:
        return [api.get_user_overview("ADA").num_models or 0 for api in (nobody, ada)]

    before = counts()
    ada.create_repo("ada/only-mine", private=True)
    assert counts() == [before[0], before[1] + 1]
    with pytest.raises(HfHubHTTPError, match="404"):
        nobody.get_user_overview("nobody-here")
    mine = {item.id: item for item in ada.list_user_repos()}
    assert mine[repo].storage == 300
    assert mine["ada/only-mine"].visibility == "private"
    with pytest.raises(HfHubHTTPError, match="401"):
        list(nobody.list_user_repos())


def test_tags_in_use_are_listed_by_type(ada: HfApi, nobody: HfApi, repo: str) -> None:
    card = b"---\ntags: [watercolour]\nlicense: mit\n---\n"
    put(ada, repo, "README.md", card)
    tags = nobody.get_model_tags()
    assert "watercolour" in [tag["id"] for tag in tags["other"]]
    assert {"id": "license:mit", "label": "mit", "type": "license"} in tags["license"]
    ada.update_repo_settings(repo, private=True)
    assert "watercolour" not in [tag["id"] for tag in nobody.get_model_tags()["other"]]


def test_ignored_and_tracked_files_follow_the_repo(ada: HfApi, repo: str, tmp_path: Path) -> None:
    put(ada, repo, ".gitignore", b"*.log\n!keep.log\nout/\n")
    put(ada, repo, ".gitattributes", b"# comment\n*.png filter=lfs diff=lfs -text\n")
    (tmp_path / "out").mkdir()
    for name in ("a.log", "keep.log", "out/x.txt", "b.txt", "c.png"):
        (tmp_path / name).write_bytes(name.encode())
    ada.upload_folder(repo_id=repo, folder_path=tmp_path)
    files = set(ada.list_repo_files(repo)) - {".gitignore", ".gitattributes", "ink.safetensors"}
    assert files == {"keep.log", "b.txt", "c.png"}
    lfs = {item.path: item.lfs for item in ada.get_paths_info(repo, ["b.txt", "c.png"])}  # type: ignore[union-attr]
    assert lfs["b.txt"] is None
    assert lfs["c.png"] is not None


@pytest.mark.parametrize("call", ["info", "download", "unlike", "commits"])
def test_a_name_without_a_namespace_is_no_repo(ada: HfApi, tmp_path: Path, call: str) -> None:
    calls = {
        "info": lambda: ada.model_info("gpt2"),
        "download": lambda: ada.hf_hub_download("gpt2", "config.json", cache_dir=tmp_path),
        "unlike": lambda: ada.unlike("gpt2"),
        "commits": lambda: ada.list_repo_commits("gpt2"),
    }
    with pytest.raises(RepositoryNotFoundError):
        calls[call]()


def _bearer(api: HfApi) -> dict[str, str]:
    return {"Authorization": f"Bearer {api.token}"}


def _ask(api: HfApi, repo: str) -> httpx2.Response:
    address = f"{api.endpoint}/api/models/{repo}/ask-access"
    return httpx2.post(address, headers=_bearer(api))
