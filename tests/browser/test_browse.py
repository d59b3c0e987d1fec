"""What a person does in the browser: search, open, copy, download, filter, read at night."""

import json
import re
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import N_MORE
from tests.fixtures.server import RunningHub

pytestmark = pytest.mark.browser


def test_search_open_copy_and_download(page: Page, site: RunningHub, ink: bytes) -> None:
    page.goto("/")
    page.keyboard.press("/")
    expect(page.get_by_label("Search adapters")).to_be_focused()
    page.keyboard.type("inki")
    expect(page.locator(".card")).to_have_count(1)
    assert page.url == f"{site.url}/?q=inki"
    page.locator(".card > a").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Ink drawings")
    assert page.evaluate("window.broken") is None

    page.get_by_role("button", name="Copy: diffusers snippet").click()
    expect(page.get_by_text("Copied", exact=True)).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert f'os.environ["HF_ENDPOINT"] = "{site.url}"' in copied
    assert 'pipe.load_lora_weights("admin/ink", weight_name="ink.safetensors")' in copied
    compile(copied, "snippet", "exec")

    page.get_by_text("curl", exact=True).click()
    page.get_by_role("button", name="Copy: curl snippet").click()
    assert f"{site.url}/admin/ink/resolve/main/ink.safetensors" in page.evaluate(
        "navigator.clipboard.readText()"
    )
    page.get_by_role("button", name="inkish").click()
    assert page.evaluate("navigator.clipboard.readText()") == "inkish"

    with page.expect_download() as started:
        page.get_by_role("link", name="Download").first.click()
    assert started.value.suggested_filename == "ink.safetensors"
    assert Path(started.value.path()).read_bytes() == ink


def test_a_card_copies_and_downloads_without_being_opened(
    page: Page, site: RunningHub, ink: bytes
) -> None:
    page.goto("/?q=ink+drawings")
    card = page.locator(".card")
    card.hover()
    card.get_by_role("button", name="Copy trigger words of Ink drawings").click()
    assert page.evaluate("navigator.clipboard.readText()") == "inkish"
    with page.expect_download() as started:
        card.get_by_role("link", name="Download Ink drawings").click()
    assert Path(started.value.path()).read_bytes() == ink
    assert page.url == f"{site.url}/?q=ink+drawings"


def test_filters_are_in_the_address_and_back_goes_back(page: Page) -> None:
    page.goto("/")
    facets = page.get_by_label("Filters")
    facets.get_by_role("link", name="odd", exact=False).first.click()
    expect(page.get_by_role("status").first).to_have_text("35 repos")
    assert page.url.endswith("/?tag=odd")
    page.get_by_label("Search adapters").fill("other 1")
    expect(page.get_by_role("status").first).to_have_text("5 repos for “other 1”")
    assert "tag=odd" in page.url
    page.get_by_role("link", name="Remove filter odd").click()
    expect(page.get_by_role("status").first).to_have_text("11 repos for “other 1”")
    page.go_back()
    expect(page.get_by_role("status").first).to_have_text("5 repos for “other 1”")
    page.goto("/")
    facets.locator("li", has_text="odd").hover()
    facets.get_by_role("link", name="Without odd").click()
    expect(page.get_by_role("status").first).to_have_text(re.compile("^3[67] repos$"))
    assert page.url.endswith("/?not_tag=odd")


def test_the_keyboard_stays_on_the_filter_it_chose(page: Page) -> None:
    page.goto("/")
    chosen = page.get_by_label("Filters").get_by_role("link", name="odd", exact=False).first
    chosen.focus()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"tag=odd$"))
    expect(chosen).to_have_attribute("aria-current", "true")
    expect(chosen).to_be_focused()


def test_sorting_and_loading_more(page: Page) -> None:
    page.goto("/?q=other")
    page.get_by_label("Sort by").select_option("name")
    expect(page).to_have_url(re.compile(r"sort=name$"))
    expect(page.locator(".card .name").first).to_have_text("Other 0")
    expect(page.locator(".card")).to_have_count(60)
    page.get_by_role("link", name="Load more").click()
    expect(page.locator(".card")).to_have_count(N_MORE)
    expect(page.get_by_role("link", name="Load more")).to_have_count(0)
    shown = page.locator(".card > a").evaluate_all("links => links.map(a => a.pathname)")
    assert len(set(shown)) == N_MORE


def test_arrow_keys_walk_the_grid(page: Page) -> None:
    page.goto("/?sort=name")
    page.locator(".card > a").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    place = page.evaluate(
        "[...document.querySelectorAll('.card > a')].indexOf(document.activeElement)"
    )
    columns = page.evaluate(
        "getComputedStyle(document.getElementById('cards-grid')).gridTemplateColumns.split(' ').length"
    )
    assert place == 1 + columns
    name = page.locator(".card .name").nth(place).inner_text()
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text(name)


def test_the_theme_follows_the_system_until_it_is_chosen(page: Page) -> None:
    def ground() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page.goto("/")
    light = ground()
    page.emulate_media(color_scheme="dark")
    dark = ground()
    assert dark != light
    page.get_by_role("button", name="Dark or light theme").click()
    assert ground() == light
    page.goto("/admin/ink")
    assert page.locator("html").get_attribute("data-theme") == "light"
    assert ground() == light


def test_pictures_open_full_screen(page: Page) -> None:
    page.goto("/admin/ink")
    page.get_by_role("link", name="Enlarge: a fox, inkish").click()
    viewer = page.get_by_role("dialog", name="Picture")
    expect(viewer.get_by_text("a fox, inkish")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(viewer.get_by_text("a cat, inkish")).to_be_visible()
    shown = viewer.locator("img")
    assert shown.evaluate("i => i.decode().then(() => i.naturalWidth)") == 1280
    viewer.get_by_role("button", name="Copy the prompt").click()
    assert page.evaluate("navigator.clipboard.readText()") == "a cat, inkish"
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    expect(page.get_by_role("link", name="Enlarge: a cat, inkish")).to_be_focused()


def test_filters_on_a_phone_are_a_sheet(phone: Page) -> None:
    phone.goto("/")
    sheet = phone.locator("#facets")
    expect(sheet).to_be_hidden()
    phone.get_by_role("button", name="Filters", exact=False).first.tap()
    expect(sheet).to_be_visible()
    sheet.get_by_role("link", name="odd", exact=False).first.tap()
    expect(sheet.get_by_role("button", name="Show 35 results")).to_be_visible()
    sheet.get_by_role("button", name="Show 35 results").tap()
    expect(sheet).to_be_hidden()
    expect(phone.get_by_role("status").first).to_contain_text("35 repos")


@pytest.mark.parametrize(
    "path", ["/", "/admin/ink", "/admin/ink/tree/main", "/login", "/jobs", "/x"]
)
def test_nothing_is_wider_than_a_phone(phone: Page, complaints: list[str], path: str) -> None:
    phone.goto(path)
    assert phone.evaluate("document.documentElement.scrollWidth") == 390
    if path == "/x":  # The browser reports the 404 that was asked for.
        complaints.clear()


def test_signing_in_following_a_job_and_signing_out(page: Page, site: RunningHub) -> None:
    page.goto("/jobs")
    page.get_by_role("link", name="Sign in").last.click()
    page.get_by_label("Token").fill(site.admin_token)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="No jobs yet")).to_be_visible()
    recipe = {
        "schema": 1,
        "kind": "merge",
        "inputs": [{"ref": "admin/ink:ink.safetensors", "strength": 0.5}],
        "method": {"name": "linear"},
        "rank": {"fixed": 4},
    }
    publish = {"repo": "admin/merged", "path": "merged.safetensors"}
    job = httpx2.post(
        f"{site.url}/api/merges",
        content=json.dumps({"recipe": recipe, "publish": publish}),
        headers=site.auth | {"Content-Type": "application/json"},
        timeout=120,
    ).raise_for_status()
    page.goto(f"/jobs/{job.json()['id']}")
    expect(page.get_by_role("heading", level=1)).to_have_text(
        "Merge into admin/merged/merged.safetensors"
    )
    # The page reloads itself once the event of the end arrives.
    page.get_by_role("link", name="Open admin/merged").click(timeout=240_000)
    expect(page.get_by_role("heading", level=1)).to_have_text("merged")
    page.get_by_label("Account of admin").click()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("link", name="Sign in").first).to_be_visible()


def test_pages_work_without_script(browser: Browser, site: RunningHub, ink: bytes) -> None:
    context = browser.new_context(base_url=site.url, java_script_enabled=False)
    page = context.new_page()
    page.goto("/")
    page.get_by_label("Search adapters").fill("ink drawings")
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(1)
    page.locator(".card > a").click()
    page.get_by_text("curl", exact=True).click()
    expect(page.get_by_label("curl snippet", exact=True)).to_be_visible()
    with page.expect_download() as started:
        page.get_by_role("link", name="Download").first.click()
    assert Path(started.value.path()).read_bytes() == ink
    page.goto("/?q=other")
    page.get_by_role("link", name="Load more").click()
    expect(page.locator(".card")).to_have_count(N_MORE - 60)
    page.get_by_role("button", name="Dark or light theme").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    context.close()


CONTRAST = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (css) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css;
    canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => { const f = (v) => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b); };
  const ground = (element) => { for (; element; element = element.parentElement) {
    const found = rgb(getComputedStyle(element).backgroundColor);
    if (found[3] === 255) return found; } return rgb("white"); };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest(".card, .hidden-label, .toast, .skip, dialog, script, noscript")) continue;
    const [a, b] = [light(rgb(getComputedStyle(element).color)), light(ground(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push(`${ratio.toFixed(2)} ${walker.currentNode.data.trim().slice(0, 40)}`);
  }
  return bad;
}
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_has_the_contrast_of_wcag_aa(page: Page, theme: str) -> None:
    page.emulate_media(color_scheme=theme)
    for path in ("/?tag=style", "/admin/ink", "/admin/ink/tree/main", "/login", "/jobs"):
        page.goto(path)
        assert page.evaluate(CONTRAST) == [], (path, theme)


NAMELESS = """
() => [...document.querySelectorAll("a, button, input:not([type=hidden]), textarea, select, summary")]
  .filter(e => e.checkVisibility() && !(
    e.textContent.trim() || e.ariaLabel || e.labels?.length || e.ariaHidden === "true"))
  .map(e => e.outerHTML.slice(0, 200))
"""


def test_everything_that_can_be_used_has_a_name(page: Page) -> None:
    for path in ("/", "/admin/ink", "/admin/ink/tree/main", "/login"):
        page.goto(path)
        assert page.evaluate(NAMELESS) == [], path
        assert page.locator("img:not([alt])").count() == 0, path
        assert page.locator("h1").count() == 1, path
