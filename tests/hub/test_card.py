"""README.md as input from strangers: what is taken from it, and what it cannot do."""

import pytest

from hub.adapters.card import MAX_TAGS, Widget, parse_card
from hub.web.markdown import card_html
from tests.fixtures.catalogue import CARD


def front(matter: str) -> bytes:
    return f"---\n{matter}\n---\ntext\n".encode()


def test_a_card_gives_title_facts_and_pictures_in_its_order() -> None:
    card = parse_card(CARD.encode())
    assert card.problem is None
    assert card.title == "Ink drawings"
    assert card.summary == "Lines as if drawn with a brush."
    assert (card.license, card.base_model) == ("cc-by-4.0", "demo/tiny-sd")
    assert card.tags == ("style", "ink")
    assert card.trigger_words == ("ink style",)
    assert card.widgets == (
        Widget("second.png", "a fox, ink style", None),
        Widget("samples/0.png", None, None),
    )
    assert card.body.strip() == "Lines as if drawn with a **brush**."


@pytest.mark.parametrize(
    ("matter", "problem"),
    [
        ("a: &x [1]\nb: *x", "YAML aliases are not allowed"),
        ("a: " + "[" * 17 + "]" * 17, "it is nested deeper than 16"),
        ("a: " + "x" * 70_000, "it is longer than 64 KiB"),
        ("a: !!python/object/apply:os.system [id]", "line 2: could not determine a constructor"),
        ("a: [", "line 3: expected the node content"),
        ("- a\n- b", "it is not a mapping of names to values"),
        ("a: 2024-99-99", "month must be in 1..12"),
        ("a: \x01", "unacceptable character"),
        ('a: "\\ud800"', "line 2: a text holds half of a surrogate pair"),
        ('b: 1\n"\\udfff": a', "line 3: a text holds half of a surrogate pair"),
        ("a: 0x" + "f" * 300, "line 2: a number has more than 1024 bits"),
        ("a: 1" + ":0" * 600, "line 2: a number has more than 1024 bits"),
        ("? [a]\n: 1\n? {b: 1}\n: 2", "line 2: found unhashable key"),
    ],
)
def test_bad_front_matter_is_told_and_the_text_is_kept(matter: str, problem: str) -> None:
    card = parse_card(front(matter))
    assert problem in (card.problem or "")
    assert card.body == "text\n"
    assert card.tags == ()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\x00",
        b"---",
        b"---\n---",
        b"---\n: \n---\n",
        b"---\ntags: 7\nwidget: {}\n---\n",
    ],
)
def test_odd_cards_are_read_without_a_complaint_to_the_visitor(data: bytes) -> None:
    parse_card(data)


def test_words_from_cards_are_bounded() -> None:
    tags = "\n".join(f"- tag{i} {'x' * 300}" for i in range(150))
    card = parse_card(front(f"tags:\n{tags}\ninstance_prompt: null\nlicense: [a]"))
    assert len(card.tags) == MAX_TAGS
    assert {len(tag) for tag in card.tags} == {100}
    assert card.trigger_words == ()
    assert card.license is None


XSS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt&colon;alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](vbscript:x)",
    "![x](javascript:alert(1))",
    '![x](x.png "onerror=alert(1)")',
    '[x](<"onmouseover="alert(1)>)',
    "<svg/onload=alert(1)>",
    "<math><mtext></table><style><img src onerror=alert(1)>",
    '```"><script>alert(1)</script>\nx\n```',
    "<a href='//evil'>x</a>",
    "![x](http://evil.example/pixel.png)",
    "![x](//evil.example/pixel.png)",
]


@pytest.mark.parametrize("body", XSS)
def test_cards_cannot_run_or_load_anything(body: str) -> None:
    html = str(card_html(body, "/demo/ink", {}))
    tags = html.replace("&lt;", "").replace("&gt;", "")
    assert "<script" not in tags
    assert "<svg" not in tags
    assert "<img" not in tags
    for word in ('href="javascript', 'href="data:', 'href="vbscript'):
        assert word not in tags.lower()


def test_relative_links_lead_into_the_repo_and_others_are_marked() -> None:
    html = str(card_html("[a](train/config.yaml) [b](https://example.org)", "/demo/ink", {}))
    assert 'href="/demo/ink/blob/main/train/config.yaml"' in html
    assert 'href="https://example.org" rel="noopener noreferrer nofollow"' in html


def test_html_is_text_and_comments_are_for_the_author() -> None:
    body = "<!-- graft: a -->\n\n<Gallery />\n\nA <b>bold</b> <!-- x --> word\n\n<div>\nblock\n</div>\n\n<!-- /graft -->"
    html = str(card_html(body, "/demo/ink", {}))
    assert "graft" not in html
    assert "Gallery" not in html
    assert "<p>A &lt;b&gt;bold&lt;/b&gt;  word</p>" in html
    assert "<p>&lt;div&gt;\nblock\n&lt;/div&gt;</p>" in html


def test_the_heading_of_an_unwritten_card_is_no_title() -> None:
    """peft saves this README.md beside every adapter (0.21)."""
    card = parse_card(b"# Model Card for Model ID\n\n<!-- Provide a quick summary -->\n\n")
    assert card.title is None
    assert parse_card(b"# Model Card for Ink\n").title == "Model Card for Ink"
