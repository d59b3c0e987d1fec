"""The page of graft report: whole, alone, safe, and readable on a phone."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from cli.report_page.page import render
from merge.reports.measure import measure
from merge.reports.report import Report
from tests.cli.test_merge import graft, refused
from tests.cli.test_report import BORDO, CHEX, DEMO, PIPELINE
from tests.fixtures import factors
from tests.fixtures.engine import make_recipe

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that every element is closed, and keeps tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report_on(*paths: Path) -> Report:
    recipe, files = make_recipe([(path, 1.0) for path in paths], rank={"fixed": 4})
    return measure(recipe, files)


@pytest.fixture(scope="module")
def four() -> Report:
    names = ("bordo-style", "chex-style", "quil", "vexo")
    return report_on(*(DEMO / name / f"{name}.safetensors" for name in names))


def test_a_page_needs_nothing_but_itself(four: Report) -> None:
    text = render(four)
    page = Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert not re.search(r"https?://|url\(|@import", text)
    assert page.tags.count("svg") == 5
    assert page.tags.count("title") > 50  # that of the page, and of every mark


@pytest.mark.parametrize("n", [1, 2, 4])
def test_every_adapter_is_named_with_one_colour(n: int) -> None:
    names = ["bordo-style", "chex-style", "quil", "vexo"][:n]
    report = report_on(*(DEMO / name / f"{name}.safetensors" for name in names))
    page = Page(render(report))
    for index, name in enumerate(names):
        assert name in page.words
        assert any(f"a{index}" in value.split() for key, value in page.attributes if key == "class")
    swatches = {v for key, v in page.attributes if key == "class" and v.startswith("swatch a")}
    assert {v for v in swatches if v != "swatch adds"} == {f"swatch a{i}" for i in range(n)}


def test_names_of_files_are_text_and_not_markup(tmp_path: Path) -> None:
    odd = tmp_path / "<b onclick=x>&'\".safetensors"
    odd.write_bytes(BORDO.read_bytes())
    page = Page(render(report_on(odd, CHEX)))
    assert page.tags.count("b") == 4  # the tiles' numbers
    assert not [name for name, _ in page.attributes if name == "onclick"]
    assert any("<b onclick=x>" in words for words in page.words)


def test_the_command_writes_it_and_replaces_nothing_unasked(tmp_path: Path) -> None:
    arguments = ("report", f"{BORDO}=0.8", CHEX, "--base", PIPELINE, "--html", "out.html")
    assert graft(tmp_path, *arguments).returncode == 0
    text = (tmp_path / "out.html").read_text("utf-8")
    assert "bordo-style 0.8 + chex-style 1" in text
    assert "baked in float16" in text
    assert "--force" in refused(tmp_path, *arguments)
    assert graft(tmp_path, *arguments, "--force").returncode == 0


@pytest.mark.parametrize("has_base", [False, True])
def test_what_depends_on_a_base_has_a_page_and_a_command_that_works(
    has_base: bool, tmp_path: Path
) -> None:
    held = factors.layers("oft")
    factors.write_factors(tmp_path / "a.safetensors", "oft", held)
    factors.write_base(tmp_path / "base.safetensors", held)
    more = ["--base", "base.safetensors"] if has_base else []
    done = graft(tmp_path, "report", "a.safetensors", "--html", "a.html", *more)
    assert done.returncode == 0
    page = Page((tmp_path / "a.html").read_text("utf-8"))
    commands = [line for line in done.stdout.splitlines() if line.startswith("graft merge")]
    if not has_base:
        assert commands == []
        assert "svg" not in page.tags
        assert "--base measures them" in " ".join(done.stdout.split())
        return
    (command,) = commands
    assert command in page.words
    assert (
        graft(tmp_path, *command.replace("merged.safetensors", "out").split()[1:]).returncode == 0
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_asks_for_nothing(scheme: str, tmp_path: Path, four: Report) -> None:
    (tmp_path / "page.html").write_text(render(four), encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        context = browser.new_context(
            viewport={"width": 390, "height": 844},
            color_scheme=scheme,  # type: ignore[arg-type]
        )
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        assert len(asked) == 1
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        background, text = page.evaluate(
            "(() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color] })()"
        )
        assert background != text
        clipped = page.evaluate(
            "[...document.querySelectorAll('svg text')].filter(t => { const b = t.getBBox(); "
            "const v = t.ownerSVGElement.viewBox.baseVal; return b.x < -1 || b.x + b.width > v.width + 1 })"
            ".map(t => t.textContent)"
        )
        assert clipped == []
        browser.close()
