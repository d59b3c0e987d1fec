"""Suggestions follow from the measurements, and what they promise holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from merge.families import FAMILIES
from merge.methods import METHODS
from merge.recipe import Recipe
from merge.reports import suggest as rules
from merge.reports.measure import measure
from merge.reports.report import Suggestion
from tests.fixtures import factors, packed
from tests.fixtures.engine import make_adapter, make_recipe, run, some_of
from tests.fixtures.families import tiny_family
from tests.merge.test_convert import lokr

FAMILY = tiny_family("sd15-tiny")
NAMES = some_of(FAMILY)


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in (FAMILY, packed.packed_family()):
        monkeypatch.setitem(FAMILIES, family.name, family)


def adapter(folder: Path, name: str, **options: Any) -> Path:
    names = options.pop("names", NAMES)
    return make_adapter(folder / f"{name}.safetensors", FAMILY, names, **options).path


def opposite(path: Path, to: Path) -> Path:
    """The same file with all its changes negated."""
    tensors = load_file(path)
    save_file({k: -t if "lora_up" in k else t for k, t in tensors.items()}, to)
    return to


def suggested(inputs: Sequence[tuple[Path, float]], **fields: Any) -> Suggestion:
    found = measure(*make_recipe(inputs, **fields)).suggestion
    assert found is not None
    return found


def test_every_row_names_a_method_that_there_is() -> None:
    for row in rules.METHODS:
        assert row.method["name"] in METHODS
        document = {"kind": "merge", "inputs": [{"ref": "a"}], "method": row.method}
        assert Recipe.parse(document).method.name == row.method["name"]


def test_unrelated_adapters_and_those_of_other_layers_are_summed(tmp_path: Path) -> None:
    one, two = adapter(tmp_path, "one"), adapter(tmp_path, "two", seed=2)
    found = suggested([(one, 1.0), (two, 1.0)])
    assert found.method == {"name": "linear"}
    assert "orthogonal" in found.reasons[1]
    first = adapter(tmp_path, "first", names=NAMES[:4])
    last = adapter(tmp_path, "last", names=NAMES[4:])
    apart = suggested([(first, 1.0), (last, 1.0)])
    assert apart.method == {"name": "linear"}
    assert "different layers" in apart.reasons[1]


def test_one_adapter_has_nothing_to_be_combined_with(tmp_path: Path) -> None:
    found = suggested([(adapter(tmp_path, "one"), 1.0)])
    assert (found.strengths, found.method) == ((1.0,), {"name": "linear"})
    assert "nothing to combine" in found.reasons[1]


def test_what_points_the_same_way_is_scaled_to_its_energy(tmp_path: Path) -> None:
    one = adapter(tmp_path, "one")
    same = adapter(tmp_path, "same", dialect="diffusers")
    found = suggested([(one, 1.0), (same, 1.0)])
    assert found.method == {"name": "linear", "normalise": "energy"}
    assert "2.00 times" in found.reasons[1]


def test_what_cancels_by_itself_is_raised_by_svc_and_loses_no_more_than_is_said(
    tmp_path: Path,
) -> None:
    """Half of the second undoes half of the first, in the directions that both have."""
    one = adapter(tmp_path, "one")
    minus = opposite(one, tmp_path / "minus.safetensors")
    inputs = [(one, 1.0), (minus, 0.5)]
    found = suggested(inputs)
    assert found.method == {"name": "svc", "floor": 0.5}
    assert "80 % of the energy cancels" in found.reasons[1]
    merged = run(tmp_path / "svc.safetensors", inputs, method=found.method, rank=found.rank)
    plain = run(tmp_path / "linear.safetensors", inputs)
    assert merged.certificate["norm"] > 1.5 * plain.certificate["norm"]
    assert merged.certificate["truncation"] <= 0.01
    assert "1 % of error, of what svc gives" in found.reasons[2]


def test_opposites_are_said_to_be_nothing_together(tmp_path: Path) -> None:
    one = adapter(tmp_path, "one")
    minus = opposite(one, tmp_path / "minus.safetensors")
    found = suggested([(one, 1.0), (minus, 1.0)])
    assert (found.method, found.rank) == ({"name": "linear"}, {"exact": True})
    assert "their sum is nothing" in found.reasons[1]


def test_a_negative_strength_is_left_to_subtract(tmp_path: Path) -> None:
    one = adapter(tmp_path, "one")
    other = adapter(tmp_path, "other", dialect="diffusers")
    found = suggested([(one, 1.0), (other, -0.5)])
    assert found.method == {"name": "linear"}
    assert "80 % of the energy cancels" in found.reasons[1]


def test_only_a_strength_that_nobody_chose_is_lowered(tmp_path: Path) -> None:
    quiet = adapter(tmp_path, "quiet", alpha=1.0)
    loud = adapter(tmp_path, "loud", alpha=20.0, seed=2)
    found = suggested([(quiet, 1.0), (loud, 1.0)])
    norms = measure(*make_recipe([(quiet, 1.0), (loud, found.strengths[1])])).total.norms
    assert found.strengths[0] == 1
    assert norms[1] / norms[0] == pytest.approx(2, rel=0.05)
    assert "loud is" in found.reasons[0]
    chosen = suggested([(quiet, 0.9), (loud, 1.0)])
    assert chosen.strengths == (0.9, 1.0)
    assert "as you chose" in chosen.reasons[0]


def test_the_rank_that_is_suggested_costs_what_is_said_and_loses_no_more(tmp_path: Path) -> None:
    """Two adapters that share most of their directions need little more room than one."""
    one = adapter(tmp_path, "one", rank=8)
    same = adapter(tmp_path, "same", rank=8, dialect="diffusers")
    inputs = [(one, 0.7), (same, 0.7)]
    found = suggested(inputs)
    assert list(found.rank) == ["shared"]
    certificate = run(tmp_path / "out.safetensors", inputs, rank=found.rank).certificate
    assert certificate["truncation"] <= 0.01
    exact = run(tmp_path / "exact.safetensors", inputs)
    assert (tmp_path / "out.safetensors").stat().st_size < 0.6 * exact.size
    assert "% of error" in found.reasons[2]


def test_what_has_full_rank_gets_a_rank_that_a_merge_takes(tmp_path: Path) -> None:
    stem = "diffusion_model.layers.0.linear1"
    rows = 3 * packed.WIDTH + packed.HIDDEN
    full = packed.write(
        tmp_path / "full.safetensors", lokr(stem, (4, 2), (rows // 4, packed.WIDTH // 2), None)
    )
    found = suggested([(full, 1.0)])
    run(tmp_path / "out.safetensors", [(full, 1.0)], rank=found.rank, method=found.method)
    assert (tmp_path / "out.safetensors").exists()


def test_nothing_that_was_measured_suggests_nothing(tmp_path: Path) -> None:
    held = factors.layers("oft")
    path = factors.write_factors(tmp_path / "a.safetensors", "oft", held)
    assert measure(*make_recipe([(path, 1.0)])).suggestion is None
