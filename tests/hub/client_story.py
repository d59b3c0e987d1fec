"""What one version of huggingface_hub does with a hub: run by test_clients.py in its environment.

Arguments: the endpoint, a token, a repo of that user that does not exist yet, a folder to use.
"""

import os
import sys
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.utils import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

try:
    from huggingface_hub.errors import RevisionNotFoundError
except ImportError:
    from huggingface_hub.utils import RevisionNotFoundError

endpoint, token, repo, folder = sys.argv[1:]
api = HfApi(endpoint=endpoint, token=token)
nobody = HfApi(endpoint=endpoint, token=False)


def fails(kind: type, call: object) -> None:
    """The call raises this error, and no other."""
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


def main() -> None:
    assert api.whoami()["name"] == repo.split("/")[0]
    api.create_repo(repo, private=True)
    api.create_repo(repo, private=True, exist_ok=True)
    assert api.model_info(repo).private is True
    fails(RepositoryNotFoundError, lambda: nobody.model_info(repo))

    # Over the regular way, over LFS or Xet, and a change that is none.
    source = Path(folder) / "source"
    (source / "deep").mkdir(parents=True)
    (source / "README.md").write_text("---\ntags: [ink]\nlicense: mit\n---\n# Ink\n")
    (source / "deep" / "a b.txt").write_text("text")
    (source / "ink.safetensors").write_bytes(os.urandom(12 * 2**20))
    (source / "empty.txt").write_bytes(b"")
    first = api.upload_folder(repo_id=repo, folder_path=str(source))
    again = api.upload_folder(repo_id=repo, folder_path=str(source))
    assert api.model_info(repo).sha == first.oid == again.oid
    names = ["README.md", "deep/a b.txt", "empty.txt", "ink.safetensors"]
    assert api.list_repo_files(repo) == names
    assert [sibling.rfilename for sibling in api.model_info(repo).siblings] == names
    assert set(api.model_info(repo).tags) == {"ink", "license:mit"}

    cache = Path(folder) / "cache"
    found = Path(snapshot_download(repo, endpoint=endpoint, token=token, cache_dir=str(cache)))
    for name in names:
        assert (found / name).read_bytes() == (source / name).read_bytes(), name
    print("DOWNLOADED", flush=True)
    sys.stdin.readline()
    snapshot_download(repo, endpoint=endpoint, token=token, cache_dir=str(cache))
    print("AGAIN", flush=True)
    sys.stdin.readline()

    api.create_branch(repo, branch="work/a")
    api.create_tag(repo, tag="v1", revision=first.oid[:8])
    operations = [
        CommitOperationAdd("new.txt", b"new"),
        CommitOperationDelete("deep/", is_folder=True),
    ]
    api.create_commit(repo, operations, commit_message="work", revision="work/a")
    assert api.list_repo_files(repo, revision="work/a") == [
        *("README.md", "empty.txt", "ink.safetensors", "new.txt")
    ]
    refs = api.list_repo_refs(repo)
    assert [ref.name for ref in refs.branches] == ["main", "work/a"]
    assert [ref.target_commit for ref in refs.tags] == [first.oid]
    assert api.list_repo_commits(repo, revision="work/a")[0].title == "work"
    fails(EntryNotFoundError, lambda: api.hf_hub_download(repo, "none", cache_dir=str(cache)))
    fails(RevisionNotFoundError, lambda: api.model_info(repo, revision="none"))
    fails(ValueError, lambda: put("README.md", b"---\nmodel-index: x\n---\n"))

    proposed = [CommitOperationAdd("new.txt", b"new")]
    pull = api.create_commit(repo, proposed, commit_message="propose", create_pr=True)
    assert pull.pr_revision == "refs/pr/1"
    api.merge_pull_request(repo, 1)
    assert api.file_exists(repo, "new.txt")

    api.super_squash_history(repo)
    assert len(api.list_repo_commits(repo)) == 1
    gate()
    pack = api.create_collection(repo.replace("/", " "), description="What is here").slug
    api.add_collection_item(pack, repo, "model", note="good")
    api.move_repo(repo, f"{repo}-moved")
    assert api.model_info(repo).id == f"{repo}-moved"
    assert collected(pack) == [(f"{repo}-moved", "model", "good")]
    (listed,) = nobody.list_collections(item=f"models/{repo}-moved")
    assert listed.slug == pack
    api.delete_repo(f"{repo}-moved")
    assert api.repo_exists(f"{repo}-moved") is False
    assert collected(pack) == []
    api.delete_collection(pack)
    print("DONE", huggingface_hub.__version__, flush=True)


def put(path: str, content: bytes) -> None:
    api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo)


def collected(slug: str) -> list:
    items = nobody.get_collection(slug).items
    return [(item.item_id, item.item_type, item.note) for item in items]


def gate() -> None:
    """Clients before 0.31 set the gate alone, later ones with the visibility."""
    api.update_repo_settings(repo, private=False)
    api.update_repo_settings(repo, gated="manual")
    assert nobody.model_info(repo).gated == "manual"
    cache = str(Path(folder) / "other")
    fails(GatedRepoError, lambda: nobody.hf_hub_download(repo, "README.md", cache_dir=cache))


main()
