"""Names of repos, files, branches: one rule each, POSIX and Windows on every platform."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub.errors import BadName, BadPath
from hub.repos.paths import check_path, check_ref_name
from hub.users.names import check_name


@pytest.mark.parametrize(
    "path",
    ["a", "a/b.txt", "unet/diffusion_pytorch_model.safetensors", ".gitattributes", "é/日本語.png",
     "a b/c d.txt", "@x#1%20.png", "consul.txt", "com10", "x.git", "a" * 255, "[1](2){3}.png"],
)  # fmt: skip
def test_ordinary_paths_pass_unchanged(path: str) -> None:
    assert check_path(path) == path


BAD_PATHS = [
    "", "/", "/etc/passwd", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b",
    "\\", "a\\b", "C:/a", "C:a", "a:stream", "\\\\server\\share", "a*", "a?", 'a"', "a<", "a>", "a|",
    "a\0b", "a\nb", "a\r", "\x7f", "\x85", "\x1b[31m", "a\u202eb", "a\u200bb", "\ufeffa", "\u2028",
    "a.", "a ", " a", "a./b", "a /b", "con", "NUL.txt", "a/aux", "Com1.png", "lpt9", "COM¹",
    ".git", ".GIT/config", "a/.git/b", "e\u0301", "a" * 256, "é" * 128, "a/" * 512 + "b",
    "\ud800", "\ufdd0",
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS, ids=[ascii(p)[:20] for p in BAD_PATHS])
def test_a_path_that_some_system_cannot_take_is_refused_and_named(path: str) -> None:
    with pytest.raises(BadPath) as refused:
        check_path(path)
    assert refused.value.param == "path"


@given(st.text())
def test_an_accepted_path_stays_below_its_folder_and_is_one_line(path: str) -> None:
    try:
        check_path(path)
    except BadPath:
        return
    parts = path.split("/")
    assert not {"", ".", ".."} & set(parts)
    assert path.isprintable()
    assert not set("\\:") & set(path)


@pytest.mark.parametrize("name", ["a", "tiny-sd", "A.b_c-1", "0x", "a" * 96])
def test_ordinary_names_pass(name: str) -> None:
    assert check_name(name, "name") == name


@pytest.mark.parametrize(
    "name",
    ["", "a" * 97, "-a", ".a", "_a", "a-", "a.", "a--b", "a..b", "a.git", "A.GIT", "a.lock", "a/b",
     "a b", "é", "а", "a\n", "con", "Nul", "com1.x", "a%2f", "a#"],
)  # fmt: skip
def test_a_name_that_could_pass_for_another_is_refused(name: str) -> None:
    with pytest.raises(BadName) as refused:
        check_name(name, "name")
    assert refused.value.param == "name"


@pytest.mark.parametrize("name", ["main", "feature/a", "v1.0", "1.0.0+x", "a" * 39, "A_b"])
def test_ordinary_branches_pass(name: str) -> None:
    assert check_ref_name(name, "branch") == name


@pytest.mark.parametrize(
    "name",
    ["", "-a", "/a", "a/", "a//b", ".a", "a/.b", "a..b", "a.lock", "a.", "a b", "a~1", "a^", "a:b",
     "refs/pr/5", "refs/heads/x", "a" * 40, "0123456789" * 4, "ABCDEF0123" * 4, "a" * 256, "a\n",
     "a@{1}", "é"],
)  # fmt: skip
def test_a_branch_that_could_pass_for_a_commit_or_break_git_is_refused(name: str) -> None:
    with pytest.raises(BadName):
        check_ref_name(name, "branch")
