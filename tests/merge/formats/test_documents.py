"""docs/formats says what the code does: every reason, and code blocks that run."""

import re
import runpy
from pathlib import Path

import pytest

from merge import errors
from merge.doubts import of_refusal
from merge.families import FAMILIES
from merge.formats.dialects import write_keys
from merge.formats.grammar import ALGORITHMS
from merge.formats.suffixes import SUFFIXES

ROOT = Path(__file__).parents[3]
FORMATS = ROOT / "docs" / "formats"


def test_every_reason_is_in_the_specification_and_the_other_way_round() -> None:
    code = "".join(p.read_text() for p in (ROOT / "merge" / "formats").glob("*.py"))
    documented = re.findall(r"`(st_\w+)`", (FORMATS / "safetensors.md").read_text())
    assert set(re.findall(r'"(st_\w+)"', code)) == set(documented)


def test_every_warning_is_documented_and_the_other_way_round() -> None:
    code = "".join((ROOT / "merge" / name).read_text() for name in ("doubts.py", "identify.py"))
    codes = set(re.findall(r'[dD]oubt\(\s*"(\w+)"', code))
    codes |= set(re.findall(r'^ +\(?\("(alpha_\w+)"', code, re.MULTILINE))
    refusals = [errors.BadAdapter, *errors.BadAdapter.__subclasses__()]
    codes |= {of_refusal(error.__new__(error), "f").code for error in refusals}
    table = (FORMATS / "identify.md").read_text().partition("## Warnings")[2]
    rows = "".join(line for line in table.splitlines(keepends=True) if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", rows)) == codes


def test_every_algorithm_is_named_on_the_page() -> None:
    page = (FORMATS / "identify.md").read_text()
    assert {row.name for row in ALGORITHMS} - set(re.findall(r"`([\w-]+)`", page)) == set()


# Layouts that share the page of the algorithm they are most like.
_PAGES = {"norm": "full", "ln-tuning": "replacement", "tokens": "replacement"}


@pytest.mark.parametrize("name", sorted({row.name for row in ALGORITHMS if row.layout}))
def test_an_algorithm_has_a_page_with_the_suffix_of_every_tensor(name: str) -> None:
    page = (FORMATS / f"{_PAGES.get(name, name)}.md").read_text()
    named = set(re.findall(r"\.\w+(?:\.\w+)*", " ".join(re.findall(r"`([^`\n]+)`", page))))
    for row in ALGORITHMS:
        is_described = row.name == name and row.layout
        for role in row.required if is_described else ():
            numbered = role.partition(".")[0] if role not in _ROLES else role
            spellings = {key for key, its in SUFFIXES.items() if its.role in (role, numbered)}
            assert spellings & named, f"{row.layout}: {role}, which is one of {sorted(spellings)}"


_ROLES = {its.role for its in SUFFIXES.values()}


@pytest.mark.parametrize("name", sorted(path.name for path in FORMATS.glob("*.md")))
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (FORMATS / name).read_text(), re.DOTALL)
    assert blocks
    (tmp_path / "example.py").write_text("\n".join(blocks))
    runpy.run_path("example.py")


@pytest.mark.parametrize(
    ("family", "dialect"),
    [
        ("sd15", "kohya"),
        ("sdxl", "kohya"),
        ("sdxl", "comfy"),
        ("sd15", "diffusers"),
        ("sd15", "peft"),
    ],
)
def test_the_keys_of_the_specification_are_those_we_write(family: str, dialect: str) -> None:
    module = ("unet", "down_blocks.1.attentions.0.proj_in")
    assert module[1] in FAMILIES[family].components["unet"]
    keys = write_keys([module], dialect, family)[module]
    assert f"`{keys['down']}`" in (FORMATS / "lora.md").read_text()
