"""Pages as a browser without script gets them: rooms, links, sessions, refusals, headers."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
from sqlmodel import select
from starlette.testclient import TestClient

from hub.adapters.service import publish
from hub.context import Hub
from hub.deps import SESSION_COOKIE
from hub.repos import refs
from hub.repos import service as repos
from hub.repos.models import Repo, RepoType
from hub.repos.operations import Delete
from hub.users import service as users
from hub.users.names import RESERVED
from hub.users.service import Viewer
from hub.web import static_files
from hub.web.patterns import pattern_svg
from hub.web.render import count, duration, size
from hub.web.routes import local
from tests.fixtures.catalogue import CARD, lora_bytes, picture, publish_files
from tests.hub.conftest import bearer, make_user

HTML = {"Accept": "text/html,*/*"}
HOST = "http://127.0.0.1:8470"


class Page(HTMLParser):
    """Links, texts and inline code of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.inline: list[str] = []
        self.titles: list[str] = []
        self._is_in_title = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        self._is_in_title = tag == "title"
        self.links += [names[n] or "" for n in ("href", "src", "action") if n in names]
        self.links += re.findall(r"(/\S+) \d+w", names.get("srcset") or "")
        self.inline += [n for n in names if n.startswith("on") or n == "style"]
        if tag == "style" or (tag == "script" and "src" not in names):
            self.inline.append(tag)

    def handle_data(self, data: str) -> None:
        if self._is_in_title:
            self.titles.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._is_in_title = False


def visit(client: TestClient, path: str, **headers: str) -> str:
    answer = client.get(path, headers=HTML | headers)
    assert answer.status_code == 200, (path, answer.text)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    return answer.text


@pytest.fixture
def ink(hub: Hub, admin: Viewer, tmp_path: Path) -> str:
    files = {
        "ink.safetensors": lora_bytes(tmp_path, metadata={"modelspec.trigger_phrase": "inkish"}),
        "deep/other (1) #2&.safetensors": lora_bytes(tmp_path, seed=1),
        "README.md": CARD.encode() + b"\n[c](train/c.yaml) ![s](second.png)\n",
        "train/c.yaml": b"rank: 4\n",
        "second.png": picture(),
        "samples/0.png": picture(40, 80),
        "näme [x].txt": b"text",
    }
    publish_files(hub, admin, "admin/ink", files)
    publish_files(hub, admin, "admin/nothing", {})
    publish_files(hub, admin, "admin/broken", {"b.safetensors": b"\xff" * 9, "p.png": b"no"})
    publish_files(hub, admin, "admin/pictures", {"a.png": picture()}, type=RepoType.DATASET)
    return "/admin/ink"


def test_every_link_of_every_page_leads_somewhere(client: TestClient, ink: str) -> None:
    """A crawl from the gallery: no dead link, no inline script or style, one title each."""
    waiting, seen = ["/", "/admin/nothing", "/datasets/admin/pictures", "/nowhere"], set()
    while waiting:
        path = waiting.pop()
        bare = path.partition("#")[0]
        if bare in seen or not bare.startswith("/"):
            continue
        # Each choice of facets links to all others, and each page to its own way to sign in.
        if bare.startswith(("/?", "/login?next=/%3F")) and re.search("(&|%26).*(&|%26)", bare):
            continue
        seen.add(bare)
        if bare in ("/logout", "/settings/theme"):
            continue
        answer = client.get(bare, headers=HTML)
        if bare.startswith("/bench") and answer.status_code == 303:
            waiting.append(answer.headers["Location"])
            continue
        expected = 404 if bare == "/nowhere" else 200
        assert answer.status_code == expected, bare
        if not answer.headers["Content-Type"].startswith("text/html"):
            continue
        page = Page(answer.text)
        assert page.inline == [], bare
        assert len(page.titles) == 1, bare
        waiting += [urljoin(bare, link) for link in page.links if "://" not in link]
    for path in (
        ink,
        "/admin/ink/tree/main/train",
        "/admin/ink/blob/main/train/c.yaml",
        "/admin/ink/commits/main",
        "/admin/ink/resolve/main/ink.safetensors?download=true",
        "/admin/broken",
        "/datasets/admin/pictures/tree/main",
        "/admin",
        "/jobs",
        "/login?next=/",
        "/api/openapi.json",
    ):
        assert path in seen, path


def test_a_repo_page_says_what_the_file_says(client: TestClient, ink: str) -> None:
    text = visit(client, ink)
    for expected in (
        "<h1>Ink drawings</h1>",
        "Lines as if drawn with a <strong>brush</strong>.",
        'data-copy="inkish"',
        "Tiny SD",
        "Stated in the file&#39;s metadata",
        "Read from the tensors in the file",
        "licence cc-by-4.0",
        "a fox, ink style",
        f"os.environ[&#34;HF_ENDPOINT&#34;] = &#34;{HOST}&#34;",
        "weight_name=&#34;ink.safetensors&#34;",
        f"{HOST}/admin/ink/resolve/main/ink.safetensors",
        'href="/admin/ink/blob/main/train/c.yaml"',
    ):
        assert expected in text, expected
    other = visit(client, f"{ink}?file=deep/other (1) %232%26.safetensors")
    assert "resolve/main/deep/other%20%281%29%20%232%26.safetensors" in other
    assert client.get(f"{ink}?file=no.safetensors", headers=HTML).status_code == 404


def test_broken_and_empty_repos_say_so(client: TestClient, ink: str) -> None:
    broken = visit(client, "/admin/broken")
    assert "b.safetensors: " in broken
    assert "Not readable" in broken
    assert "<img" not in broken
    assert "This repo is empty" in visit(client, "/admin/nothing")
    assert "No files yet" in visit(client, "/admin/nothing/tree/main")


def test_the_gallery_shows_repos_once_and_what_was_asked_for(client: TestClient, ink: str) -> None:
    everything = visit(client, "/")
    assert everything.count('<article class="card">') == 2
    found = visit(client, "/?q=brush&tag=style&rank_min=2")
    assert found.count('<article class="card">') == 1
    assert 'value="brush"' in found
    assert 'href="/?q=brush&amp;rank_min=2"' in found  # the chip that takes the tag away
    assert '<input type="hidden" form="search" name="tag" value="style">' in found
    none = visit(client, '/?q=%3Cscript%3E"')
    assert "Nothing matches" in none
    assert '<script>"' not in none
    assert "No adapters yet" not in none


def test_an_empty_hub_says_how_to_begin(client: TestClient) -> None:
    text = visit(client, "/")
    assert "No adapters yet" in text
    assert f"graft login {HOST}" in text


def test_the_gallery_goes_on_by_cursor(hub: Hub, admin: Viewer, client: TestClient) -> None:
    tiny = b"\x02" + b"\0" * 7 + b"{}"
    for n in range(5):
        publish_files(hub, admin, f"admin/r{n}", {"a.safetensors": tiny})
    shown, path = [], "/?limit=2&sort=name"
    while path:
        text = visit(client, path)
        shown += re.findall(r'<article class="card">\s*<a href="([^"]+)"', text)
        more = re.search(r'<a class="button" href="([^"]+)"[^>]*>Load more', text)
        path = more[1].replace("&amp;", "&") + "&limit=2" if more else ""
    assert shown == [f"/admin/r{n}" for n in range(5)]


def test_revisions_with_slashes_and_commits_are_found(
    hub: Hub, admin: Viewer, client: TestClient, ink: str
) -> None:
    with hub.db.write() as session:
        repo = repos.get_repo(session, admin, "admin", "ink")
        before = repo.head
        refs.create_branch(session, admin, repo, "try/train")
    gone = [Delete("train/c.yaml")]
    publish(hub, admin, "admin", "ink", operations=gone, message="Drop it", branch="try/train")
    assert "c.yaml" in visit(client, f"{ink}/tree/{before}/train")
    assert "rank: 4" in visit(client, f"{ink}/blob/{before}/train/c.yaml")
    assert "c.yaml" not in visit(client, f"{ink}/tree/try/train")
    assert "Drop it" in visit(client, f"{ink}/commits/try/train")
    missing = client.get(f"{ink}/blob/try/train/train/c.yaml", headers=HTML)
    assert missing.status_code == 404


def test_a_moved_repo_leads_on(hub: Hub, admin: Viewer, client: TestClient, ink: str) -> None:
    with hub.db.write() as session:
        repo = repos.get_repo(session, admin, "admin", "ink")
        repos.move_repo(session, admin, repo, "admin", "ink2")
    answer = client.get(ink, headers=HTML)
    assert (answer.status_code, answer.headers["Location"]) == (307, "/admin/ink2")


# Sessions and forms


def test_signing_in_and_out(hub: Hub, client: TestClient) -> None:
    assert "Sign in" in visit(client, "/")
    wrong = client.post("/login", data={"token": "graft_wrong"})
    assert wrong.status_code == 401
    assert "unknown, revoked or too old" in wrong.text
    assert SESSION_COOKIE not in client.cookies
    body = {"token": f" {hub.admin_token}\n", "next": "/jobs"}
    answer = client.post("/login", data=body)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/jobs")
    cookie = answer.headers["Set-Cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert "Account of admin" in visit(client, "/")
    other = client.post("/logout", headers={"Origin": "http://evil.example"})
    assert other.status_code == 403
    assert "Account of admin" in visit(client, "/")
    assert client.post("/logout", headers={"Origin": HOST}).status_code == 303
    assert "Account of admin" not in visit(client, "/")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/jobs?x=1", "/jobs?x=1"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("https://evil.example", "/"),
        ("javascript:alert(1)", "/"),
        ("/a\r\nSet-Cookie: x=1", "/"),
        ("/\t/evil.example", "/"),
        ("", "/"),
    ],
)
def test_nobody_is_sent_elsewhere(address: str, expected: str) -> None:
    assert local(address) == expected


def test_the_theme_works_without_script(client: TestClient) -> None:
    assert "data-theme" not in visit(client, "/")
    answer = client.post("/settings/theme", data={"theme": "dark", "next": "/login"})
    assert (answer.status_code, answer.headers["Location"]) == (303, "/login")
    assert '<html lang="en" data-theme="dark">' in visit(client, "/")
    client.cookies.clear()
    client.cookies.set("theme", "><script>")
    assert "data-theme" not in visit(client, "/")


# Refusals


@pytest.mark.parametrize(
    ("path", "status", "heading"),
    [
        ("/nobody", 404, "Not here"),
        ("/admin/nowhere", 404, "Not here"),
        ("/admin/nowhere/tree/main", 404, "Not here"),
        ("/a/b/c/d", 404, "Not here"),
        ("/jobs/ffff", 401, "Please sign in"),
        ("/?limit=x", 422, "That did not work"),
    ],
)
def test_people_get_a_page_and_programs_get_json(
    client: TestClient, path: str, status: int, heading: str
) -> None:
    shown = client.get(path, headers=HTML)
    assert (shown.status_code, shown.headers["Content-Type"]) == (
        status,
        "text/html; charset=utf-8",
    )
    assert f"<h1>{heading}</h1>" in shown.text
    assert "Traceback" not in shown.text
    told = client.get(path)
    assert (told.status_code, set(told.json()["error"])) == (status, {"code", "message", "param"})


def test_an_error_of_ours_is_a_page_without_a_stack(
    hub: Hub, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("hub.web.gallery.search.search", fail)
    with TestClient(client.app, base_url=HOST, raise_server_exceptions=False) as quiet:
        answer = quiet.get("/", headers=HTML)
    assert answer.status_code == 500
    assert "<h1>The hub made a mistake</h1>" in answer.text
    assert "secret detail" not in answer.text


# Headers and files


def test_pages_run_only_what_we_ship_and_are_nobodys_to_keep(client: TestClient) -> None:
    headers = client.get("/", headers=HTML).headers
    policy = headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert headers["Cache-Control"] == "private, no-cache"
    assert headers["Referrer-Policy"] == "same-origin"
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_static_files_are_cached_for_ever_under_their_build(client: TestClient) -> None:
    answer = client.get(static_files.address("tokens.css"))
    assert answer.headers["Content-Type"].startswith("text/css")
    assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    stale = client.get("/static/files/0000000000000000/tokens.css")
    assert stale.content == answer.content
    assert stale.headers["Cache-Control"] == "public, no-cache"


def test_scripts_are_small_and_need_nobody_else() -> None:
    folder = Path(static_files.__file__).parent / "static"
    scripts = {path.name: path.read_text() for path in folder.glob("*.js")}
    assert sum(map(len, scripts.values())) < 200_000
    for name, text in scripts.items():
        assert name == "htmx.min.js" or "http" not in text, name
    assert "http" not in "".join(path.read_text() for path in folder.glob("*.css"))
    assert (folder / "htmx.LICENSE.txt").read_text().startswith("Zero-Clause BSD")


def test_first_segments_of_our_addresses_are_no_namespaces(client: TestClient) -> None:
    from hub.web.routes import ROUTERS

    for router in ROUTERS:
        for route in router.routes:
            first = getattr(route, "path", "/").split("/")[1]
            assert not first or first.startswith("{") or first in RESERVED, first


def test_patterns_differ_with_the_numbers_and_the_file(client: TestClient) -> None:
    flat, hilly = "5" * 24, "012345678987654321012345"
    drawn = {pattern_svg(p, s) for p in (flat, hilly) for s in ("00000000", "89abcdef")}
    assert len(drawn) == 4
    answer = client.get(f"/static/patterns/{hilly}-89abcdef.svg")
    assert answer.headers["Content-Type"] == "image/svg+xml"
    assert answer.text == pattern_svg(hilly, "89abcdef")


def test_a_file_of_ours_is_drawn_from_its_own_weights(
    hub: Hub, admin: Viewer, client: TestClient, tmp_path: Path
) -> None:
    for seed in (1, 2):
        publish_files(
            hub, admin, f"admin/s{seed}", {"a.safetensors": lora_bytes(tmp_path, seed=seed)}
        )
    found = client.get("/api/adapters").json()["items"]
    profiles = {re.search(r"patterns/(\d{24})-", item["pattern_url"])[1] for item in found}
    assert len(profiles) == 2
    assert "5" * 24 not in profiles


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (size(0), "0 B"),
        (size(999), "999 B"),
        (size(1000), "1.0 KB"),
        (size(41_234_567), "41.2 MB"),
        (size(5_100_000_000), "5.1 GB"),
        (size(999_999), "1.0 MB"),
        (count(999), "999"),
        (count(1284), "1.3k"),
        (count(2000), "2k"),
        (count(233_000), "233k"),
        (count(999_999), "1M"),
        (duration(0.2), "1 s"),
        (duration(59.4), "59 s"),
        (duration(61), "1 min"),
        (duration(3720), "1 h 2 min"),
    ],
)
def test_numbers_in_words(shown: str, expected: str) -> None:
    assert shown == expected


def test_downloads_are_counted_where_they_are_shown(hub: Hub, client: TestClient, ink: str) -> None:
    with hub.db.write() as session:
        repo = session.exec(select(Repo).where(Repo.key == "admin/ink")).one()
        repo.downloads = 1284
        session.add(repo)
    assert "1,284 downloads" in visit(client, ink)
    assert ">1.3k<" in visit(client, "/")


def test_a_private_repo_is_marked_for_its_owner(
    hub: Hub, admin: Viewer, client: TestClient
) -> None:
    publish_files(hub, admin, "admin/mine", {"a.txt": b"x"}, private=True)
    answer = client.get("/admin/mine", headers=HTML | bearer(hub.admin_token))
    assert ">private<" in answer.text


def test_whoever_has_to_sign_in_comes_back_to_where_the_form_was(
    client: TestClient, ink: str
) -> None:
    answer = client.get("/settings/tokens", headers=HTML)
    assert answer.status_code == 401
    assert 'class="button primary" href="/login?next=/settings/tokens"' in answer.text
    assert "Bearer" not in answer.text
    referer = {"Referer": f"{HOST}/admin/ink/discussions/new", "Origin": HOST}
    answer = client.post(f"{ink}/discussions/new", data={"title": "x"}, headers=HTML | referer)
    assert answer.status_code == 401
    assert 'href="/login?next=/admin/ink/discussions/new"' in answer.text
    evil = {"Referer": "http://evil.example//other.example", "Origin": HOST}
    answer = client.post(f"{ink}/discussions/new", data={"title": "x"}, headers=HTML | evil)
    assert 'href="/login?next=/"' in answer.text


def test_a_namespace_says_whose_it_is_and_how_to_begin(hub: Hub, client: TestClient) -> None:
    _, token = make_user(hub, "ada")
    with hub.db.write() as session:
        user = users.find_user(session, "ada")
        users.create_organization(session, "acme", user, full_name="Acme Studio")
    mine = client.get("/acme", headers=HTML | bearer(token)).text
    assert "Acme Studio" in mine
    assert "graft push my-style.safetensors acme/my-style" in mine
    assert 'href="/organizations/acme"' in mine
    others = visit(client, "/acme")
    assert "Acme Studio" in others
    assert "acme has no repo that you may see" in others
    assert "/organizations/acme" not in others
