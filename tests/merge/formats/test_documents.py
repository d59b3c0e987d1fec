"""docs/formats says what the code does: every reason, and code blocks that run."""

import re
import runpy
from pathlib import Path

import pytest

from merge.families import FAMILIES
from merge.formats.dialects import write_keys

ROOT = Path(__file__).parents[3]
FORMATS = ROOT / "docs" / "formats"


def test_every_reason_is_in_the_specification_and_the_other_way_round() -> None:
    code = "".join(p.read_text() for p in (ROOT / "merge" / "formats").glob("*.py"))
    documented = re.findall(r"`(st_\w+)`", (FORMATS / "safetensors.md").read_text())
    assert set(re.findall(r'"(st_\w+)"', code)) == set(documented)


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
