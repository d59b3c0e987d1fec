"""Discussions, pull requests, access and webhooks as a person has them before the eyes."""

import base64
import json

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.test_browse import CONTRAST, NAMELESS
from tests.fixtures.server import RunningHub

pytestmark = pytest.mark.browser
TALK = "/admin/talk"


def commit(api: httpx2.Client, summary: str, path: str, content: bytes, query: str = "") -> None:
    file = {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"}
    lines = [{"key": "header", "value": {"summary": summary}}, {"key": "file", "value": file}]
    body = "\n".join(map(json.dumps, lines))
    headers = {"Content-Type": "application/x-ndjson"}
    path = f"/api/models{TALK}/commit/main{query}"
    api.post(path, content=body, headers=headers).raise_for_status()


@pytest.fixture(scope="module", autouse=True)
def talk(site: RunningHub) -> None:
    """A private repo, which the gallery of the other tests does not show, and proposals for it."""
    with httpx2.Client(base_url=site.url, headers=site.auth, timeout=60) as api:
        body = {"name": "talk", "private": True}
        api.post("/api/repos/create", json=body).raise_for_status()
        commit(api, "Card", "README.md", b"# Talk\n")
        commit(api, "A longer card", "README.md", b"# Talk\n\nMore.\n", "?create_pr=1")
        commit(api, "A licence", "LICENSE", b"MIT", "?create_pr=1")
        commit(api, "Another card", "README.md", b"# Talk about it\n")
        said = "> quoted\n\n`code` and [a link](x.md)\n\n    " + "a long line of code " * 9
        text = {"title": "Too dark?", "description": said}
        api.post(f"/api/models{TALK}/discussions", json=text).raise_for_status()
        api.put(f"/api/models{TALK}/settings", json={"gated": "manual"}).raise_for_status()
        hook = {"url": "https://a.example/hook", "watched": [{"type": "user", "name": "admin"}]}
        api.post("/api/settings/webhooks", json=hook | {"domains": ["repo"]}).raise_for_status()


def sign_in(page: Page, site: RunningHub, then: str) -> None:
    page.goto(f"/login?next={then}")
    page.get_by_label("Token").fill(site.admin_token)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Account of admin")).to_be_visible()


def test_talking_and_merging_need_no_script(browser: Browser, site: RunningHub) -> None:
    context = browser.new_context(base_url=site.url, java_script_enabled=False)
    page = context.new_page()
    sign_in(page, site, f"{TALK}/discussions")
    page.get_by_role("link", name="New discussion").click()
    page.get_by_label("Title").fill("Which base?")
    page.keyboard.press("Tab")
    page.keyboard.type("Is it **SD 1.5**?")
    page.get_by_role("button", name="Start discussion").click()
    expect(page.get_by_role("heading", name="Which base?")).to_be_visible()
    expect(page.locator(".comment strong", has_text="SD 1.5")).to_be_visible()
    page.get_by_label("Your comment").fill("Yes.")
    page.get_by_role("button", name="Comment", exact=True).click()
    expect(page.locator(".comment")).to_have_count(2)
    page.get_by_role("button", name="Close discussion").click()
    expect(page.locator(".state")).to_have_text("closed")

    page.goto(f"{TALK}/discussions?type=pull_request")
    page.get_by_role("link", name="A longer card").click()
    expect(page.get_by_role("alert")).to_contain_text("README.md was changed in main too")
    expect(page.get_by_role("button", name="Merge into main")).to_have_count(0)
    page.goto(f"{TALK}/discussions?type=pull_request")
    page.get_by_role("link", name="A licence").click()
    expect(page.get_by_role("row", name="LICENSE added 3 B")).to_be_visible()
    page.get_by_role("button", name="Merge into main").click()
    expect(page.locator(".state")).to_have_text("merged")

    page.goto(f"{TALK}/settings")
    page.get_by_label("Type admin/talk").fill("admin/ink")
    page.get_by_role("button", name="Delete this repo").click()
    expect(page.get_by_role("alert")).to_contain_text("Nothing was deleted")
    context.close()


def test_the_pages_of_a_team_can_be_read_and_used_by_everybody(
    page: Page, site: RunningHub
) -> None:
    """On the width of a phone, in both themes: contrast, names, one heading, nothing cut off."""
    page.set_viewport_size({"width": 390, "height": 844})
    sign_in(page, site, f"{TALK}/discussions")
    page.goto("/settings/webhooks")
    hook = page.get_by_role("link", name="https://a.example/hook").get_attribute("href")
    talks = [f"{TALK}/discussions{rest}" for rest in ("", "/1", "/2", "/3", "/new")]
    others = [f"{TALK}/settings", f"{TALK}/access", "/settings/webhooks", hook, "/admin"]
    others += ["/settings", "/settings/tokens", "/settings/users", "/settings/audit"]
    for path in [*talks, *others]:
        assert path is not None
        page.goto(path)
        for theme in ("light", "dark"):
            # Without motion: colours of buttons fade from theme to theme.
            page.emulate_media(color_scheme=theme, reduced_motion="reduce")
            assert page.evaluate(CONTRAST) == [], (path, theme)
        assert page.evaluate(NAMELESS) == [], path
        assert page.evaluate("document.documentElement.scrollWidth") == 390, path
        assert page.locator("h1").count() == 1, path
