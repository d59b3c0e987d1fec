"""A real hub process and a real Chromium, one of each for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from hub.context import open_hub
from hub.settings import Settings
from hub.users import service as users
from tests.fixtures.catalogue import lora_bytes, picture, publish_files
from tests.fixtures.server import RunningHub, running_hub

CHROMIUM = "/usr/bin/chromium"
# Nothing the browser would do by itself: no GPU, no updates, no calls home.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
N_MORE = 70
# How long a step may take on a busy machine; nothing waits longer than it has to.
expect.set_options(timeout=60_000)


@pytest.fixture(scope="package")
def ink(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that the tests look for, open and download."""
    folder = tmp_path_factory.mktemp("ink")
    return lora_bytes(folder, rank=8, metadata={"modelspec.trigger_phrase": "inkish"})


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory, ink: bytes) -> Iterator[RunningHub]:
    """A hub with one adapter to look for among others, more than a page of them."""
    folder = tmp_path_factory.mktemp("site")
    with open_hub(Settings(data_dir=folder / "data", min_free_bytes=0)) as hub:
        assert hub.admin_token is not None
        with hub.db.read() as session:
            admin = users.viewer_of(session, hub.admin_token)
        for n in range(N_MORE):
            tags = "[plain]" if n % 2 else "[plain, odd]"
            publish_files(
                hub,
                admin,
                f"admin/other-{n:02}",
                {
                    "a.safetensors": b"\x02" + b"\0" * 7 + b"{}",
                    "README.md": f"---\ntags: {tags}\n---\n# Other {n}\n".encode(),
                },
            )
        card = (
            b"---\ntags: [style]\nbase_model: demo/tiny-sd\nwidget:\n"
            b"- text: a fox, inkish\n  output:\n    url: samples/0.png\n"
            b"- text: a cat, inkish\n  output:\n    url: samples/1.png\n---\n"
            b"# Ink drawings\n\n<script>window.broken = true</script>\n"
            b"[x](javascript:window.broken=true) <img src=x onerror=window.broken=true>\n"
        )
        files = {
            "ink.safetensors": ink,
            "README.md": card,
            "samples/0.png": picture(),
            "samples/1.png": picture(colour="navy"),
        }
        publish_files(hub, admin, "admin/ink", files)
    with running_hub(folder) as running:
        yield running


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if not Path(CHROMIUM).exists():
        pytest.fail(f"{CHROMIUM} is missing: install Debian's package 'chromium'")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser's console said: errors, broken rules of the policy, exceptions."""
    return []


def watch(page: Page, complaints: list[str]) -> Page:
    page.on("console", lambda m: complaints.append(m.text) if m.type in _BAD else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda r: _failed(r, complaints))
    return page


def _failed(request: Request, complaints: list[str]) -> None:
    # A page that is left stops its own requests.
    if request.failure != "net::ERR_ABORTED":
        complaints.append(f"{request.url}: {request.failure}")


_BAD = ("error", "warning")


@pytest.fixture
def page(browser: Browser, site: RunningHub, complaints: list[str]) -> Iterator[Page]:
    """A desktop window in the light theme; the test fails if the browser complained."""
    context = browser.new_context(
        viewport={"width": 1440, "height": 900},
        base_url=site.url,
        color_scheme="light",
        permissions=["clipboard-read", "clipboard-write"],
    )
    yield watch(context.new_page(), complaints)
    context.close()
    assert complaints == []


@pytest.fixture
def phone(browser: Browser, site: RunningHub, complaints: list[str]) -> Iterator[Page]:
    """A phone; the test fails if the browser complained."""
    context = browser.new_context(
        viewport={"width": 390, "height": 844},
        base_url=site.url,
        has_touch=True,
        is_mobile=True,
    )
    yield watch(context.new_page(), complaints)
    context.close()
    assert complaints == []
