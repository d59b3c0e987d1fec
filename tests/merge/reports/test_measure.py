"""Reports against dense float64 references, and what they predict against what merges then do."""

from collections.abc import Sequence
from itertools import combinations
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from merge import errors
from merge.execute import Cancelled
from merge.families import FAMILIES
from merge.plan import plan
from merge.reports.measure import measure
from merge.reports.report import CORE_SHARE, Report
from tests.fixtures import factors, packed
from tests.fixtures.engine import (
    MadeAdapter,
    load_deltas,
    make_adapter,
    make_recipe,
    run,
    some_of,
)
from tests.fixtures.families import tiny_family
from tests.merge.test_convert import SAME, fused_file, loha, lokr, norm_file, split_file
from tests.oracles import report as oracle

FAMILY = tiny_family("sd15-tiny")
STRENGTHS = [0.7, -0.5, 1.25]


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in (FAMILY, packed.packed_family()):
        monkeypatch.setitem(FAMILIES, family.name, family)


def report_on(inputs: Sequence[tuple[Path, float] | dict[str, Any]], **fields: Any) -> Report:
    return measure(*make_recipe(inputs, **fields), workers=2)


def three(folder: Path) -> list[MadeAdapter]:
    """Of other dialects, ranks and coverage; the third holds half of the first one's factors."""
    names = some_of(FAMILY)
    one = make_adapter(folder / "one.safetensors", FAMILY, names, rank=4)
    two = make_adapter(
        folder / "two.safetensors", FAMILY, names[2:], rank=6, seed=2, dialect="diffusers"
    )
    three = make_adapter(folder / "three.safetensors", FAMILY, names[:-2], rank=2, size=0.2)
    return [one, two, three]


def dense(adapters: Sequence[MadeAdapter], strengths: Sequence[float]) -> oracle.Changes:
    names = dict.fromkeys(name for adapter in adapters for name in adapter.deltas)
    return {
        ".".join(name): [
            None
            if name not in adapter.deltas
            else strength * adapter.deltas[name].reshape(len(adapter.deltas[name]), -1)
            for adapter, strength in zip(adapters, strengths, strict=True)
        ]
        for name in names
    }


def test_norms_cosines_energy_overlap_and_leaks_are_those_of_the_dense_changes(
    tmp_path: Path,
) -> None:
    adapters = three(tmp_path)
    report = report_on([(a.path, s) for a, s in zip(adapters, STRENGTHS, strict=True)])
    changes = dense(adapters, STRENGTHS)
    total = report.total
    assert total.norms == pytest.approx([oracle.norm(changes, i) for i in range(3)], rel=1e-6)
    assert total.norm == pytest.approx(oracle.total_norm(changes), rel=1e-6)
    assert total.apart == pytest.approx(sum(n * n for n in total.norms), rel=1e-6)
    assert total.norm**2 == pytest.approx(total.apart + total.adds + total.cancels, rel=1e-6)
    assert total.scale == pytest.approx(sqrt(total.apart) / total.norm)
    for pair in total.pairs:
        i, j = pair.pair
        assert pair.cosine == pytest.approx(oracle.cosine(changes, i, j), abs=1e-7)
        adds, cancels = oracle.adds_and_cancels(changes, i, j)
        assert (pair.adds, pair.cancels) == pytest.approx((adds, cancels), rel=1e-6)
        wanted = oracle.above_chance(changes, i, j, rows=False)
        assert pair.output == pytest.approx(wanted, abs=1e-6)
        wanted = oracle.above_chance(changes, i, j, rows=True)
        assert pair.input == pytest.approx(wanted, abs=1e-6)
    for leak in report.leaks:
        wanted = oracle.leak(changes, leak.of, leak.into, CORE_SHARE)
        assert (leak.shared, leak.core) == pytest.approx(wanted, rel=1e-6)
    assert len(report.leaks) == 6


def test_components_blocks_and_modules_add_up_to_the_whole(tmp_path: Path) -> None:
    adapters = three(tmp_path)
    report = report_on([(a.path, s) for a, s in zip(adapters, STRENGTHS, strict=True)])
    changes = dense(adapters, STRENGTHS)
    assert [group.component for group in report.components] == ["unet", "text_encoder"]
    for groups in (report.components, report.blocks):
        assert sum(group.modules for group in groups) == len(changes)
        assert sum(group.norm**2 for group in groups) == pytest.approx(report.total.norm**2)
        assert sum(group.cancels for group in groups) == pytest.approx(report.total.cancels)
    for group in report.blocks:
        its = {
            place.name: changes[place.name]
            for place in report.places
            if (place.component, place.block) == (group.component, group.block)
        }
        assert group.norm == pytest.approx(oracle.total_norm(its), rel=1e-6)
        for pair in group.pairs:
            both = [all(changes[name][i] is not None for i in pair.pair) for name in its]
            assert pair.modules == sum(both)
            assert (pair.cosine is None) == (not any(both))
    touched = [sum(its[i] is not None for its in changes.values()) for i in range(3)]
    assert list(report.total.touched) == touched
    alone = [[c is not None for c in its] for its in changes.values()]
    assert list(report.total.alone) == [
        sum(its[i] and sum(its) == 1 for its in alone) for i in range(3)
    ]
    for place in report.places:
        values = np.linalg.svd(oracle.total(changes[place.name]), compute_uv=False)
        assert place.values is not None
        np.testing.assert_allclose(place.values, values[: len(place.values)], atol=1e-7 * values[0])
        assert values[len(place.values) :].sum() < 1e-10


CHOICES: list[dict[str, Any]] = [
    {"fixed": 1},
    {"fixed": 3},
    {"fixed": 64},
    {"energy": 0.5},
    {"energy": 0.9},
    {"energy": 0.999},
    {"budget_bytes": 9_000},
    {"budget_bytes": 40_001},
    {"shared": 2},
    {"shared": 5},
]


@pytest.mark.parametrize("rank", CHOICES, ids=str)
def test_the_truncation_error_and_the_ranks_that_a_merge_then_has(
    rank: dict[str, Any], tmp_path: Path
) -> None:
    adapters = three(tmp_path)
    inputs = [(a.path, s) for a, s in zip(adapters, STRENGTHS, strict=True)]
    output = {"dtype": "float32"}
    found = report_on(inputs, rank=rank, output=output).ranks
    assert found is not None
    outcome = run(tmp_path / "out.safetensors", inputs, rank=rank, output=output)
    certificate = outcome.certificate
    # A certificate is rounded to four digits.
    assert found.asked.error == pytest.approx(certificate["truncation"], rel=5e-4, abs=1e-6)
    changes = dense(adapters, STRENGTHS)
    written = load_deltas(tmp_path / "out.safetensors", FAMILY, [*adapters[0].deltas])
    wrong = 0.0
    for name, its in adapters[0].deltas.items():
        kept = written[name].reshape(len(its), -1) if name in written else 0.0
        wrong += float(np.sum((oracle.total(changes[".".join(name)]) - kept) ** 2))
    error = sqrt(wrong) / oracle.total_norm(changes)
    assert found.asked.error == pytest.approx(error, abs=1e-6)
    ranks = [module["rank"] for module in certificate["modules"].values()]
    kept = [rank for rank in ranks if rank]
    assert found.asked.ranks == (min(kept), max(kept))
    assert found.asked.dropped == ranks.count(0)
    planned = plan(*make_recipe(inputs, rank={"exact": True}, output=output))
    sides = {module.name: sum(module.shape) for module in planned.modules}
    size = sum(
        module["rank"] * sides[name] * 4 + 4 * (module["rank"] > 0)
        for name, module in certificate["modules"].items()
    )
    assert found.asked.size_bytes == size


def test_the_error_at_every_rank_is_that_of_dense_truncation(tmp_path: Path) -> None:
    adapters = three(tmp_path)
    found = report_on([(a.path, s) for a, s in zip(adapters, STRENGTHS, strict=True)]).ranks
    assert found is not None
    changes = dense(adapters, STRENGTHS)
    assert [choice.value for choice in found.fixed] == list(range(1, 13))
    for choice in found.fixed:
        wanted = oracle.truncation(changes, int(choice.value))
        assert choice.error == pytest.approx(wanted, abs=1e-6)
    assert found.exact.error == 0
    assert found.asked == found.exact


def test_no_choice_beats_the_frontier_and_a_shared_rank_is_on_it(tmp_path: Path) -> None:
    adapters = three(tmp_path)
    found = report_on([(a.path, s) for a, s in zip(adapters, STRENGTHS, strict=True)]).ranks
    assert found is not None
    sizes, errors_there = np.array(found.frontier).T
    assert (np.diff(sizes) > 0).all()
    assert (np.diff(errors_there) < 0).all()
    for choice in (*found.fixed, *found.energy, *found.shared):
        at = np.searchsorted(sizes, choice.size_bytes, side="right")
        if 0 < at < len(sizes):
            assert choice.error >= errors_there[at] - 1e-9
    by_rank = {choice.value: choice for choice in found.fixed}
    for choice in found.shared:
        assert choice.size_bytes <= by_rank[choice.value].size_bytes
        assert choice.error <= by_rank[choice.value].error + 1e-9


def test_one_adapter_twice_overlaps_wholly_and_its_negative_cancels_it(tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one.safetensors", FAMILY, some_of(FAMILY))
    same = make_adapter(tmp_path / "same.safetensors", FAMILY, some_of(FAMILY), dialect="diffusers")
    twice = report_on([(one.path, 0.5), (same.path, 0.5)])
    (pair,) = twice.total.pairs
    assert (pair.cosine, pair.output, pair.input) == pytest.approx((1, 1, 1), abs=1e-9)
    assert twice.total.scale == pytest.approx(sqrt(0.5))
    assert twice.ranks is not None
    assert twice.ranks.fixed[3].error < 1e-7
    gone = report_on([(one.path, 0.5), (same.path, -0.5)])
    assert gone.total.pairs[0].cosine == pytest.approx(-1)
    assert gone.total.cancels == pytest.approx(-gone.total.apart)
    assert gone.total.norm < 1e-7 * sqrt(gone.total.apart)
    assert gone.total.scale is None


@pytest.mark.parametrize("rank", [6, 40])
def test_directions_that_are_dead_or_more_than_a_layer_has(rank: int, tmp_path: Path) -> None:
    adapters = []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.safetensors"
        made = make_adapter(path, FAMILY, some_of(FAMILY), rank=rank, seed=seed, size=0.3)
        tensors = load_file(path)
        for key in tensors:
            if "lora_up" in key:
                tensors[key][:, 1] = 0
                tensors[key][:, 3] = tensors[key][:, 2]
        save_file(tensors, path)
        adapters.append(MadeAdapter(path, load_deltas(path, FAMILY, made.deltas)))
    report = report_on([(adapter.path, 1.0) for adapter in adapters])
    changes = dense(adapters, [1.0, 1.0])
    for place in report.places:
        values = np.linalg.svd(oracle.total(changes[place.name]), compute_uv=False)
        assert place.values is not None
        assert len(place.values) <= len(values)
        np.testing.assert_allclose(place.values, values[: len(place.values)], atol=1e-7 * values[0])
    (pair,) = report.total.pairs
    if rank == 6:
        wanted = oracle.above_chance(changes, 0, 1, rows=False)
        assert pair.output == pytest.approx(wanted, abs=1e-6)


def test_adapters_of_other_layers_share_nothing(tmp_path: Path) -> None:
    names = some_of(FAMILY)
    one = make_adapter(tmp_path / "one.safetensors", FAMILY, names[:3])
    two = make_adapter(tmp_path / "two.safetensors", FAMILY, names[3:], seed=2)
    report = report_on([(one.path, 1.0), (two.path, 1.0)])
    (pair,) = report.total.pairs
    assert (pair.modules, pair.cosine, pair.output) == (0, None, None)
    assert report.total.alone == report.total.touched == (3, len(names) - 3)
    assert {(leak.shared, leak.core) for leak in report.leaks} == {(0.0, 0.0)}


def test_strength_zero_and_factors_of_zero_touch_nothing(tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one.safetensors", FAMILY, some_of(FAMILY))
    off = make_adapter(tmp_path / "off.safetensors", FAMILY, some_of(FAMILY), seed=2)
    zero = make_adapter(tmp_path / "zero.safetensors", FAMILY, some_of(FAMILY), zero_up=True)
    report = report_on([(one.path, 1.0), (off.path, 0.0), (zero.path, 1.0)])
    assert report.total.touched[1] == 0
    assert report.total.norms[1:] == (0.0, 0.0)
    assert [pair.cosine for pair in report.total.pairs] == [None] * 3
    assert report.ranks is not None
    assert report.ranks.fixed[-1].error == 0


STEM = "diffusion_model.layers.0.linear1"
ROWS = 3 * packed.WIDTH + packed.HIDDEN


def made(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.safetensors"
    match kind:
        case "packed":
            return fused_file(path)
        case "split":
            return split_file(path, SAME, dict.fromkeys(SAME, 3.0))
        case "loha":
            return packed.write(path, loha(STEM, ROWS, packed.WIDTH, 2, seed=1))
        case "lokr":
            return packed.write(path, lokr(STEM, (4, 2), (ROWS // 4, packed.WIDTH // 2), 1))
        case "full lokr":
            return packed.write(path, lokr(STEM, (4, 2), (ROWS // 4, packed.WIDTH // 2), None))
    return norm_file(path)


KINDS = ["packed", "split", "loha", "lokr", "full lokr", "norm"]


@pytest.mark.parametrize("pair", list(combinations(KINDS, 2)), ids="-".join)
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_any_algorithms_meet_in_our_own_modules_whatever_the_dialect(
    pair: tuple[str, str], dialect: str, tmp_path: Path
) -> None:
    paths = [made(kind, tmp_path) for kind in pair]
    # diffusers has no keys for differences of norms.
    output = {"dialect": "comfy" if "norm" in pair else dialect}
    report = report_on([(paths[0], 0.8), (paths[1], -0.6)], output=output)
    kinds = [packed.changes(path) for path in paths]
    changes: oracle.Changes = {}
    for number, (strength, both) in enumerate(zip([0.8, -0.6], kinds, strict=True)):
        for suffix, its in zip(("", ".bias"), both, strict=True):
            for name, change in its.items():
                matrix = strength * change.reshape(len(change), -1).numpy()
                changes.setdefault(".".join(name) + suffix, [None, None])[number] = matrix
    assert {place.name for place in report.places} == changes.keys()
    wanted = [oracle.norm(changes, i) for i in range(2)]
    assert report.total.norms == pytest.approx(wanted, rel=1e-5)
    assert report.total.norm == pytest.approx(oracle.total_norm(changes), rel=1e-5)
    assert not any("not measured" in note for note in report.notes)


@pytest.mark.parametrize("rank", [{"fixed": 2}, {"energy": 0.9}, {"shared": 2}], ids=str)
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
@pytest.mark.parametrize("pair", [("packed", "split"), ("packed", "full lokr")], ids="-".join)
def test_errors_are_about_the_layers_that_the_dialect_packs(
    pair: tuple[str, str], dialect: str, rank: dict[str, float], tmp_path: Path
) -> None:
    if "shared" in rank and "full lokr" in pair:
        pytest.skip("ranks of dense changes cannot be shared")
    inputs = [(made(kind, tmp_path), 0.8) for kind in pair]
    output = {"dialect": dialect, "dtype": "float32"}
    found = report_on(inputs, rank=rank, output=output).ranks
    assert found is not None
    certificate = run(tmp_path / "out.safetensors", inputs, rank=rank, output=output).certificate
    assert found.asked.error == pytest.approx(certificate["truncation"], rel=5e-4, abs=1e-6)
    assert found.asked.error > 0.01


@pytest.mark.parametrize("layout", ["dora", "oft", "ia3", "glora"])
def test_what_depends_on_a_base_is_named_without_one_and_measured_with_it(
    layout: str, tmp_path: Path
) -> None:
    held = factors.layers("lora" if layout == "dora" else layout)
    if layout == "dora":
        held = {name: its for name, its in held.items() if "dora_scale" in its.tensors}
    base = factors.write_base(tmp_path / "base.safetensors", held)
    adapter = factors.write_factors(tmp_path / "a.safetensors", layout, held)
    without = report_on([(adapter, 0.7)])
    (its,) = without.inputs
    assert set(its.unmeasured) == {f"model.{name}" for name in held}
    assert any("not measured" in note and "base" in note for note in without.notes)
    assert without.total.norm == 0
    found = report_on([(adapter, 0.7)], base=base)
    assert found.inputs[0].unmeasured == ()
    by_name = {place.name: place for place in found.places}
    for name, layer in held.items():
        delta = 0.7 * (layer.changed - layer.weight)
        assert sqrt(by_name[f"model.{name}"].gram.item()) == pytest.approx(
            np.linalg.norm(delta), rel=1e-4
        )


def test_a_report_can_be_cancelled_and_says_how_far_it_is(tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one.safetensors", FAMILY, some_of(FAMILY))
    seen: list[tuple[int, int]] = []
    recipe, files = make_recipe([(one.path, 1.0)])
    measure(recipe, files, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    with pytest.raises(Cancelled):
        measure(recipe, files, cancelled=lambda: True)


def test_what_is_no_recipe_for_a_merge_is_refused(tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one.safetensors", FAMILY, some_of(FAMILY))
    other = tmp_path / "other.safetensors"
    packed.write(other, packed.lora("lora_unet_layers_0_linear2", packed.WIDTH, 16, 2, 1))
    with pytest.raises(errors.BadRecipe, match="is for"):
        report_on([(one.path, 1.0), (other, 1.0)])
    with pytest.raises(errors.BadRecipe, match="matches no module"):
        report_on([{"ref": str(one.path), "blocks": {"*nowhere*": 0.5}}])
