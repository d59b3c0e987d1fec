"""Attacks of docs/security.md that only a browser can carry out."""

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from playwright.sync_api import Browser, Page

from tests.fixtures.catalogue import picture
from tests.fixtures.server import RunningHub

# The first ones are those of OWASP's and DOMPurify's collections that fit Markdown or HTML in it.
CARD = r"""---
tags: ["<img src=x onerror=hit(1)>", "\"><script>hit(2)</script>"]
license: "'><svg onload=hit(3)>"
base_model: "javascript:hit(4)"
instance_prompt: "<script>hit(5)</script>"
widget:
- text: "\"><img src=x onerror=hit(6)>"
  output: {url: a.png}
---
# <script>hit(7)</script> ]]><b onmouseover=hit(8)>x</b>

<script>hit(9)</script><img src=x onerror=hit(10)><svg/onload=hit(11)>
<iframe srcdoc="<script>parent.hit(12)</script>"></iframe><object data="data:text/html,x"></object>
<math><mtext></table></math><style><img src onerror=hit(13)></style>
<svg></p><style><a id="</style><img src=1 onerror=hit(14)>">
<noscript><p title="</noscript><img src=x onerror=hit(15)>">
<form id=x><input name=innerHTML></form><base href="https://evil.invalid/">
<meta http-equiv=refresh content="0;url=https://evil.invalid/"><link rel=stylesheet href=//evil.invalid>
<details open ontoggle=hit(16)><video><source onerror=hit(17)></video>

[a](javascript:hit(18)) [b](JaVaScRiPt&colon;hit(19)) [c](<java&#10;script:hit(20)>)
[d](data:text/html;base64,PHNjcmlwdD4=) [e](vbscript:x) [f](//evil.invalid/x) <javascript:hit(21)>
![g](javascript:hit(22)) ![h](https://evil.invalid/pixel.png) ![i](x.png "onerror=hit(23)")
![j](a.svg) ![k](evil.html) [l](<"onmouseover="hit(24)>)

| <img src=x onerror=hit(25)> | `<script>hit(26)</script>` |
|---|---|

```"><script>hit(27)</script>
x
```
"""
SVG = b"""<svg xmlns="http://www.w3.org/2000/svg" onload="hit(28)"><script>
document.title = "run"; fetch("https://evil.invalid/"); </script>
<image href="https://evil.invalid/x.png"/><foreignObject><body xmlns="http://www.w3.org/1999/xhtml"
onload="document.title='run'"/></foreignObject></svg>"""
HTML = b"<!doctype html><title>none</title><script>document.title = 'run'</script>"
REPO = "admin/evil"


@pytest.fixture(scope="module")
def evil(site: RunningHub) -> Iterator[str]:
    api = HfApi(endpoint=site.url, token=site.admin_token)
    api.create_repo(REPO)
    files = {"README.md": CARD.encode(), "a.svg": SVG, "evil.html": HTML, "a.png": picture()}
    files |= {"<img src=x onerror=hit(29)>.txt".replace("<", "‹").replace(">", "›"): b"x"}
    files |= {"x' onerror='hit(30)'.txt": b"<script>hit(31)</script>"}
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    message = "<script>hit(32)</script>"
    api.create_commit(REPO, operations, commit_message=message)
    yield REPO
    api.delete_repo(REPO)


@pytest.fixture
def victim(browser: Browser, site: RunningHub) -> Iterator[tuple[Page, list[str], list[str]]]:
    """A window, what it asked of other sites, and which attacks were executed."""
    context = browser.new_context(base_url=site.url)
    page = context.new_page()
    elsewhere: list[str] = []
    hits: list[str] = []
    page.expose_function("hit", lambda number: hits.append(str(number)))
    page.on("dialog", lambda dialog: (hits.append(dialog.message), dialog.dismiss()))
    own = urlsplit(site.url).netloc

    def asked(url: str) -> None:
        if urlsplit(url).netloc not in (own, "") and not url.startswith(("data:", "blob:")):
            elsewhere.append(url)

    context.on("request", lambda request: asked(request.url))
    yield page, elsewhere, hits
    context.close()


@pytest.mark.browser
def test_f9_no_card_runs_or_fetches_anything(
    evil: str, victim: tuple[Page, list[str], list[str]]
) -> None:
    page, elsewhere, hits = victim
    for address in (f"/{evil}", f"/{evil}/blob/main/README.md", f"/{evil}/tree/main",
                    f"/{evil}/commits/main", "/", "/?q=evil", "/admin"):  # fmt: skip
        page.goto(address)
        page.wait_for_load_state("networkidle")
        for link in page.locator("main a").all():
            assert not (link.get_attribute("href") or "").lower().startswith(_SCRIPTS)
        page.evaluate(
            "document.querySelectorAll('main *').forEach(e => e.dispatchEvent(new MouseEvent("
            "'mouseover', {bubbles: true})))"
        )
        assert page.locator("main script:not([src]), main iframe, main object, base").count() == 0
    assert page.evaluate("window.hit(99), 1") == 1  # the trap itself works
    page.wait_for_timeout(200)
    assert hits == ["99"]
    assert elsewhere == []


_SCRIPTS = ("javascript:", "data:", "vbscript:")


@pytest.mark.browser
@pytest.mark.parametrize("name", ["a.svg", "evil.html"])
def test_f8_an_svg_is_a_download_and_runs_nothing(
    evil: str, victim: tuple[Page, list[str], list[str]], name: str
) -> None:
    page, elsewhere, hits = victim
    address = f"/{evil}/resolve/main/{name}"
    page.goto(f"/{evil}")
    with page.expect_download() as download:
        page.evaluate("address => { location.href = address }", address)
    assert download.value.suggested_filename == name
    page.evaluate(
        "address => { const i = new Image(); i.src = address; document.body.append(i);"
        " const f = document.createElement('iframe'); f.src = address; document.body.append(f) }",
        address,
    )
    page.wait_for_timeout(500)
    assert page.title() != "run"
    assert page.evaluate("[...document.images].at(-1).naturalWidth") == 0
    assert hits == []
    assert elsewhere == []
