"""From the gallery over the bench to a merge, as a person does it in the browser."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from hub.context import open_hub
from hub.settings import Settings
from hub.users import service as users
from tests.browser.conftest import watch
from tests.fixtures.catalogue import lora_bytes, publish_files
from tests.fixtures.server import RunningHub, running_hub

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    """A hub with three adapters of one family."""
    folder = tmp_path_factory.mktemp("shop")
    with open_hub(Settings(data_dir=folder / "data", min_free_bytes=0)) as hub:
        assert hub.admin_token is not None
        with hub.db.read() as session:
            admin = users.viewer_of(session, hub.admin_token)
        for seed, name in enumerate(("ink", "robot", "cat")):
            files = {
                f"{name}.safetensors": lora_bytes(folder, seed=seed, rank=4),
                "README.md": f"# The {name}\n".encode(),
            }
            publish_files(hub, admin, f"admin/{name}", files)
    with running_hub(folder) as running:
        yield running


@pytest.fixture
def page(browser: Browser, shop: RunningHub, complaints: list[str]) -> Iterator[Page]:
    """A desktop window of the administrator; the test fails if the browser complained."""
    context = browser.new_context(
        viewport={"width": 1440, "height": 900},
        base_url=shop.url,
        permissions=["clipboard-read", "clipboard-write"],
    )
    page = watch(context.new_page(), complaints)
    page.goto("/login")
    page.get_by_label("Token").fill(shop.admin_token)
    page.get_by_role("main").get_by_role("button", name="Sign in").click()
    yield page
    context.close()
    assert complaints == []


def test_from_the_gallery_over_the_bench_to_a_merge(page: Page, shop: RunningHub) -> None:
    page.goto("/?sort=name")
    for name, said in (("ink", "On the bench"), ("robot", "On the bench with 1 more")):
        card = page.locator(".card", has_text=f"The {name}")
        card.hover()
        card.get_by_role("link", name=f"Put The {name} on the bench").click()
        expect(page.get_by_text(said, exact=True)).to_be_visible()
    assert page.url.endswith("/?sort=name")
    page.get_by_role("navigation", name="Main").get_by_role("link", name="Bench").click()
    both = "add=admin/ink:ink.safetensors=1&add=admin/robot:robot.safetensors=1"
    expect(page).to_have_url(f"{shop.url}/bench?{both}")

    report = page.get_by_label("Report", exact=True)
    expect(report.get_by_role("heading", name="Energy by block")).to_be_visible()
    energy = report.locator(".bars rect.a0").first
    before = float(energy.get_attribute("width") or 0)
    page.get_by_label("Strength of The ink").fill("0.5")
    expect(page).to_have_url(re.compile(r"ink\.safetensors=0\.5&"))
    expect(energy).not_to_have_attribute("width", f"{before:.1f}")
    page.get_by_role("button", name="Copy prompt").click()
    assert page.evaluate("navigator.clipboard.readText()") == "<lora:ink:0.5> <lora:robot:1>"

    page.get_by_label("Rank", exact=True).select_option("fixed")
    page.get_by_label("At most").fill("3")
    expect(page).to_have_url(re.compile(r"rank=fixed:3$"))
    expect(report.get_by_text("at rank 3")).to_be_visible()
    page.get_by_label("Method").select_option("ties")
    page.get_by_label("Density").fill("0.4")
    expect(page).to_have_url(re.compile(r"method=ties&with\.density=0\.4&rank=fixed:3$"))

    page.get_by_label("Into the repo").fill("admin/inkbot")
    page.get_by_role("button", name="Merge").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(
        re.compile("^Merge into admin/inkbot")
    )
    page.get_by_role("link", name="Open admin/inkbot").click()
    made = page.get_by_label("How it was made")
    expect(made).to_contain_text("Merged from 2 adapters by TIES (density 0.4")
    expect(made).to_contain_text("graft verify admin/inkbot:ink-robot.safetensors")
    made.locator("svg.lineage a", has_text="The ink").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("The ink")
    expect(page.get_by_label("Made from it").locator("svg.lineage")).to_contain_text("inkbot")


def test_a_slider_moves_the_number_and_the_number_the_slider(page: Page) -> None:
    page.goto("/bench?add=admin/ink=1")
    slide = page.locator(".slide")
    number = page.get_by_label("Strength of The ink")
    expect(page.get_by_role("heading", name="Energy by block")).to_be_visible()
    slide.fill("0.35")
    expect(number).to_have_value("0.35")
    expect(page).to_have_url(re.compile(r"/bench\?add=admin/ink=0\.35$"))
    number.fill("-0.5")
    expect(slide).to_have_value("-0.5")
    expect(page).to_have_url(re.compile(r"/bench\?add=admin/ink=-0\.5$"))


def test_an_adapter_is_added_by_name_and_taken_off(page: Page) -> None:
    page.goto("/bench?add=admin/ink=0.7")
    field = page.get_by_label("Add an adapter")
    field.fill("cat")
    expect(page.locator("#offered option")).to_have_count(1)
    field.fill("admin/cat:cat.safetensors")
    field.press("Enter")
    expect(page).to_have_url(re.compile(r"add=admin/ink=0\.7&add=admin/cat:cat\.safetensors=1$"))
    page.get_by_role("button", name="Take The ink off the bench").click()
    expect(page).to_have_url(re.compile(r"/bench\?add=admin/cat:cat\.safetensors=1$"))
    page.get_by_role("link", name="Clear").click()
    expect(page.get_by_role("heading", name="Nothing on the bench yet")).to_be_visible()


def test_a_refusal_stands_where_the_report_would(page: Page) -> None:
    page.goto("/bench?add=admin/ink=1&add=admin/robot=1&method=slerp")
    expect(page.get_by_role("heading", name="Energy by block")).to_be_visible()
    page.get_by_label("Strength of The ink").fill("-1")
    expect(page.get_by_label("Report", exact=True).locator(".note.warn")).to_contain_text("slerp")


def test_the_bench_fits_a_phone(browser: Browser, shop: RunningHub, complaints: list[str]) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, base_url=shop.url, has_touch=True, is_mobile=True
    )
    page = watch(context.new_page(), complaints)
    page.goto("/bench?add=admin/ink=1&add=admin/robot=0.5&add=admin/cat=-1&rank=fixed:2")
    expect(page.get_by_role("heading", name="Energy by block")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    context.close()
    assert complaints == []
