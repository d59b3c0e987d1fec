"""The generated part of a card, and everything of a card that must survive it."""

from dataclasses import replace

import pytest

from hub.adapters.card import parse_card
from hub.jobs.card import Facts, Ingredient, write_card

FRONT = {"base_model": "acme/sd15", "tags": ["grafthub", "lora", "merge"]}


def facts(path: str = "both.safetensors", strength: float = 0.7) -> Facts:
    return Facts(
        kind="merge",
        path=path,
        ingredients=[
            Ingredient("acme/ink", "a" * 40, "ink.safetensors", "1" * 64, f"{strength:g}"),
            Ingredient("acme/robot", "b" * 40, "robot.safetensors", "2" * 64, "0.5 (unet 0.2)"),
        ],
        method="linear; ranks add up, nothing is cut",
        triggers=["inkstyle", "a `robot` | here\nnow"],
        losses=["Cutting to the chosen rank lost 1.2 % of the change."],
        licenses=["mit", "not stated"],
        recipe_digest="sha256:" + "3" * 64,
    )


def test_a_new_card_says_what_the_file_was_made_of() -> None:
    text = write_card(None, FRONT, facts(), "both")
    assert parse_card(text.encode()).front_matter == FRONT
    for line in (
        "# both",
        "| [`acme/ink:ink.safetensors`](/acme/ink) at `aaaaaaa` | 0.7 | `1111111111111111…` |",
        "| [`acme/robot:robot.safetensors`](/acme/robot) at `bbbbbbb`"
        + " | 0.5 (unet 0.2) | `2222222222222222…` |",
        "Method: linear; ranks add up, nothing is cut.",
        "- Cutting to the chosen rank lost 1.2 % of the change.",
        "Licences of what it was made from: `mit`, `not stated`.",
        "Trigger words: `inkstyle`, `a 'robot' / here now`.",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("merge", "Merged from:"),
        ("bake", "Baked from:"),
        ("extract", "Extracted from:"),
        ("resize", "Resized from:"),
    ],
)
def test_a_card_says_how_it_was_made(kind: str, line: str) -> None:
    assert line in write_card(None, FRONT, replace(facts(), kind=kind), "x").splitlines()


CARDS = {
    "plain": "# Mine\n\nText.\n",
    "front matter": "---\nlicense: mit\n---\n# Mine\n\nText.\n",
    "no final line end": "---\nlicense: mit\n---\n# Mine\n\nText.",
    "Windows line ends": "---\r\nlicense: mit\r\n---\r\n# Mine\r\n",
    "own base": "---\nbase_model: other/base\ntags: [x]\n---\n# Mine\n",
    "in braces": "---\n{license: mit}\n---\n# Mine\n",
    "not YAML": "---\nlicense: [mit\n---\n# Mine\n",
    "only a rule": "Text\n\n---\n\nmore\n",
    "empty": "",
}


@pytest.mark.parametrize("name", CARDS)
def test_what_people_wrote_stays(name: str) -> None:
    before = CARDS[name]
    after = write_card(before, FRONT, facts(), "x")
    old, new = parse_card(before.encode()), parse_card(after.encode())
    assert {key: new.front_matter.get(key) for key in old.front_matter} == old.front_matter
    assert new.problem == old.problem
    lines = iter(after.splitlines())
    assert all(line in lines for line in before.splitlines() if line), after
    assert "## `both.safetensors`" in after


def test_missing_keys_are_added_and_present_ones_kept() -> None:
    text = write_card(CARDS["own base"], FRONT | {"instance_prompt": "ink"}, facts(), "x")
    front = parse_card(text.encode()).front_matter
    assert front == {"base_model": "other/base", "tags": ["x"], "instance_prompt": "ink"}


def test_the_same_file_again_replaces_its_own_section_only() -> None:
    text = write_card(CARDS["plain"], FRONT, facts(), "x")
    text = write_card(text, FRONT, facts("other.safetensors"), "x") + "\nAfterwards.\n"
    again = write_card(text, FRONT, facts(strength=0.25), "x")
    assert again.count("## `both.safetensors`") == 1
    assert again.count("## `other.safetensors`") == 1
    assert "| 0.25 |" in again
    assert again.endswith("\nAfterwards.\n")
    assert write_card(again, FRONT, facts(strength=0.25), "x") == again
