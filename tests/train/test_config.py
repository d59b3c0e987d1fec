"""The YAML a person writes: what is refused, and with which one sentence."""

from pathlib import Path

import pytest

from train.config import load_config, parse_config
from train.errors import BadConfig

GOOD = {"name": "x", "dataset": {"style": "stripes"}, "steps": 10}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rnak": 4}, "field rnak: there is no such field"),
        ({"rank": 0}, "field rank: .*greater than or equal to 1"),
        ({"steps": "many"}, "field steps: .*integer"),
        ({"name": "../x"}, "field name: .*pattern"),
        ({"targets": "everything"}, "field targets: .*'attn'"),
        ({"resolution": 63}, "field resolution: .*multiple of 8"),
        ({"class_images": {"share": 1.0}}, "field class_images.share: .*less than 1"),
        ({"dataset": {}}, "field dataset: .*exactly one of folder, style and concept"),
        ({"dataset": {"style": "a", "concept": "b"}}, "has style and concept"),
        ({"dataset": {"folder": "here"}}, "needs at least one entry in triggers"),
        ({"base": "acme/sd15"}, "for the base tiny-sd only"),
        ({"triggers": [" sks"]}, "field triggers: .*space"),
        ({"name": None, "rank": 0}, r"\(and 1 more\)"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(BadConfig, match=message) as caught:
        parse_config(GOOD | change, "run.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("run.yaml:")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(BadConfig, match="field steps: is required"):
        parse_config({"name": "x", "dataset": {"style": "stripes"}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "is not YAML"),
        ("- a\n- b\n", "holds no fields"),
        ("", "holds no fields"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(BadConfig, match=message):
        load_config(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="No such file"):
        load_config(tmp_path / "none.yaml")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nbase: ./base\nsteps: 1\ntriggers: [sks]\ndataset: {folder: photos}\n")
    config = load_config(path)
    assert config.dataset.folder == tmp_path / "photos"
    assert config.base == str(tmp_path / "base")


def test_the_digest_covers_what_decides_the_weights_and_nothing_else() -> None:
    digest = parse_config(GOOD).digest()
    same = {"title": "T", "samples": {"every": 5}, "output": {"dialect": "peft"}}
    assert parse_config(GOOD | same).digest() == digest
    for change in (
        {"seed": 1},
        {"rank": 4},
        {"class_images": None},
        {"dataset": {"style": "dots"}},
    ):
        assert parse_config(GOOD | change).digest() != digest


def test_alpha_is_the_rank_unless_given() -> None:
    assert parse_config(GOOD | {"rank": 6}).effective_alpha == 6.0
    assert parse_config(GOOD | {"rank": 6, "alpha": 3}).effective_alpha == 3.0
