"""Every method from real files to real files: laws that hold whatever the layout, the dialect or the order."""

import json
import os
import subprocess
import sys
import weakref
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge import presets
from merge.bake import bake
from merge.blocks import Options
from merge.errors import BadRecipe, ShapeMismatch, Unsupported
from merge.execute import execute
from merge.families import FAMILIES, Family
from merge.inputs import Inputs
from merge.method_parameters import Space
from merge.methods import METHODS
from merge.plan import BakePlan, MergePlan, plan
from tests.fixtures.engine import make_recipe, run
from tests.fixtures.packed import lora, own_state, packed_family, packed_state, write
from tests.oracles import dora as dora_oracle
from tests.oracles import linear as oracle

ROOT = Path(__file__).parents[2]
State = dict[str, torch.Tensor]
METHOD_NAMES = sorted(METHODS)
SHARES = [name for name in METHOD_NAMES if METHODS[name].parameters.takes_shares]
IN_FACTORS = [name for name in METHOD_NAMES if METHODS[name].parameters.space is not Space.ELEMENTS]
# With nothing pruned and nothing drawn a method has no reason to change a single adapter.
KEEP_ALL: dict[str, dict[str, Any]] = {
    name: {"density": 1.0}
    for name in METHOD_NAMES
    if "density" in METHODS[name].parameters.model_fields
} | {"della": {"density": 1.0, "epsilon": 0.0}, "breadcrumbs": {"density": 1.0, "gamma": 0.0}}
SPREADS = ("iso_c", "iso_cts")  # one value in place of all, also of one adapter's


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> Family:
    found = packed_family()
    monkeypatch.setitem(FAMILIES, found.name, found)
    return found


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """q, k, v and the MLP in one pair of factors, as kohya's trainers write them."""
    tensors = lora("lora_unet_layers_0_linear1", 40, 8, 3, seed=1, dtype=torch.float32)
    return write(tmp_path / "packed.safetensors", tensors)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Two of those modules apart, and one layer that the other adapter does not have."""
    tensors = {
        **lora("transformer.blocks.0.attn.to_k", 8, 8, 2, seed=5, dtype=torch.float32),
        **lora("transformer.blocks.0.proj_mlp", 16, 8, 2, seed=7, dtype=torch.float32),
        **lora("transformer.blocks.0.attn.to_out.0", 8, 16, 2, seed=9, dtype=torch.float32),
    }
    return write(tmp_path / "split.safetensors", tensors)


LAYERS = {
    "blocks.0.attn.to_q": (8, 8),
    "blocks.0.attn.to_k": (8, 8),
    "blocks.0.attn.to_v": (8, 8),
    "blocks.0.proj_mlp": (16, 8),
    "blocks.0.attn.to_out.0": (8, 16),
}
LINEAR1 = list(LAYERS)[:4]


@pytest.fixture
def own_base(tmp_path: Path, family: Family) -> Path:
    return write(tmp_path / "own-base.safetensors", own_state(family, torch.float32))


@pytest.fixture
def packed_base(tmp_path: Path, family: Family) -> Path:
    held = packed_state(family, own_state(family, torch.float32))
    return write(tmp_path / "packed-base.safetensors", held)


def _bake(out: Path, base: Path, inputs: list[Any], **fields: Any) -> State:
    run(out, inputs, base=base, numerics="reproducible", **fields)
    return load_file(out)


def _changes(out: Path, base: Path, inputs: list[Any], **fields: Any) -> dict[str, np.ndarray]:
    """What a bake adds to every layer of an unpacked base."""
    before, after = load_file(base), _bake(out, base, inputs, **fields)
    return {
        path: (after[f"{path}.weight"].double() - before[f"{path}.weight"].double()).numpy()
        for path in LAYERS
    }


def _method(name: str, **parameters: Any) -> dict[str, Any]:
    return {"name": name, **parameters}


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_neither_the_bases_layout_nor_the_names_of_an_adapter_change_a_result(
    name: str, packed: Path, split: Path, own_base: Path, packed_base: Path, tmp_path: Path
) -> None:
    inputs = [(packed, 0.7), (split, 0.5)]
    out = tmp_path / "out.safetensors"
    own = _bake(out, own_base, inputs, method=_method(name))
    of_packed = _bake(out, packed_base, inputs, method=_method(name))
    rows = torch.cat([own[f"{path}.weight"] for path in LINEAR1])
    assert torch.equal(of_packed["layers.0.linear1.weight"], rows)
    linear2 = of_packed["layers.0.linear2.weight"]
    assert torch.equal(linear2, own["blocks.0.attn.to_out.0.weight"])
    if name != "model_stock":  # of adapters at right angles it keeps nothing
        assert not torch.equal(rows, load_file(packed_base)["layers.0.linear1.weight"])


@pytest.mark.parametrize("name", IN_FACTORS)
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_merging_and_then_baking_is_baking_both(
    name: str, dialect: str, packed: Path, split: Path, own_base: Path, tmp_path: Path
) -> None:
    inputs: list[Any] = [(packed, 0.7), (split, 0.5)]
    merged, out = tmp_path / "merged.safetensors", tmp_path / "out.safetensors"
    output = {"dialect": dialect, "dtype": "float32"}
    run(merged, inputs, method=_method(name), output=output, numerics="reproducible")
    at_once = _changes(out, own_base, inputs, method=_method(name))
    in_two = _changes(out, own_base, [(merged, 1.0)])
    for path, change in at_once.items():
        np.testing.assert_allclose(in_two[path], change, rtol=0, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_the_order_of_inputs_changes_no_byte(
    name: str, packed: Path, split: Path, own_base: Path, tmp_path: Path
) -> None:
    other = lora("lora_unet_layers_0_linear1", 40, 8, 2, seed=11, dtype=torch.float32)
    third = write(tmp_path / "third.safetensors", other)
    inputs = [(packed, 0.7), (split, 0.5), (third, 1.0)][: 2 if name == "slerp" else 3]
    digests = {
        run(
            tmp_path / "out.safetensors",
            list(order),
            base=own_base,
            method=_method(name),
            numerics="reproducible",
            workers=1 + number % 3,
        ).sha256
        for number, order in enumerate(permutations(inputs))
    }
    assert len(digests) == 1


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_neither_threads_nor_tiles_nor_blocks_change_a_byte(
    name: str, packed: Path, split: Path, packed_base: Path, tmp_path: Path
) -> None:
    inputs: list[Any] = [(packed, 0.7), (split, 0.5)]
    fields: dict[str, Any] = {"method": _method(name), "numerics": "reproducible"}
    planned = plan(*make_recipe(inputs, base=packed_base, **fields))
    assert isinstance(planned, BakePlan)
    found = set()
    for workers, tile, block in [(1, 2**18, 2**22), (3, 1, 4096), (2, 40, 999)]:
        options = Options(workers, True, lambda step: None, lambda: False, block)
        digests, _ = bake(planned, tmp_path / "out.safetensors", options, tile=tile)
        found |= set(digests.values())
    assert len(found) == 1


_ANOTHER_PROCESS = """
import json, sys
from pathlib import Path
from merge.execute import execute
from merge.execute import execute
from merge.families import FAMILIES
from merge.plan import plan
from merge.recipe import Recipe
from tests.fixtures.packed import packed_family
FAMILIES["packed"] = packed_family()
for text in json.loads(sys.argv[2]):
    recipe = Recipe.load(text)
    planned = plan(recipe, {ref: Path(ref) for ref in recipe.refs()})
    print(execute(planned, Path(sys.argv[1]), workers=int(sys.argv[3])).sha256)
"""


def test_other_processes_and_libraries_threads_write_the_same_bytes(
    packed: Path, split: Path, tmp_path: Path
) -> None:
    texts, ours = [], []
    for name in METHOD_NAMES:
        fields: dict[str, Any] = {"method": _method(name), "numerics": "reproducible"}
        recipe, files = make_recipe([(packed, 0.7), (split, 0.5)], rank={"fixed": 2}, **fields)
        texts.append(recipe.model_dump_json(by_alias=True, exclude_none=True))
        ours.append(execute(plan(recipe, files), tmp_path / "out.safetensors").sha256)
    for seed, threads in (("1", "1"), ("2", "2")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        out = tmp_path / f"{seed}.safetensors"
        command = [sys.executable, "-c", _ANOTHER_PROCESS, str(out), json.dumps(texts), threads]
        done = subprocess.run(
            command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.stdout.split() == ours


def test_merging_a_merge_alone_changes_nothing(packed: Path, split: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    run(once, [(packed, 0.7), (split, 0.5)], rank={"fixed": 2})
    run(twice, [(once, 1.0)])
    first, second = load_file(once), load_file(twice)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", [name for name in METHOD_NAMES if name not in SPREADS])
def test_one_adapter_at_strength_one_is_itself(
    name: str, packed: Path, own_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    alone = _changes(out, own_base, [(packed, 1.0)])
    method = _method(name, **KEEP_ALL.get(name, {}))
    found = _changes(out, own_base, [(packed, 1.0)], method=method)
    for path, change in alone.items():
        np.testing.assert_allclose(found[path], change, rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", [name for name in METHOD_NAMES if name not in SHARES])
def test_a_strength_and_its_negative_cancel(
    name: str, packed: Path, own_base: Path, tmp_path: Path
) -> None:
    inputs = [(packed, 0.7), (packed, -0.7)]
    found = _changes(tmp_path / "out.safetensors", own_base, inputs, method=_method(name))
    for path, change in found.items():
        np.testing.assert_allclose(change, 0, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", [n for n in METHOD_NAMES if n not in IN_FACTORS])
def test_an_element_wise_method_as_an_adapter_is_its_nearest_of_that_rank(
    name: str, packed: Path, split: Path, own_base: Path, tmp_path: Path
) -> None:
    inputs: list[Any] = [(packed, 0.7), (split, 0.5)]
    out, merged = tmp_path / "out.safetensors", tmp_path / "merged.safetensors"
    dense = _changes(out, own_base, inputs, method=_method(name))
    output = {"dialect": "diffusers", "dtype": "float32"}
    method, rank = _method(name), {"fixed": 3}
    outcome = run(merged, inputs, method=method, rank=rank, output=output)
    stored = load_file(merged)
    lost = norm = 0.0
    # The unit is the packed layer; its parts are written apart, each the nearest by itself.
    for path, change in dense.items():
        up = stored[f"transformer.{path}.lora_B.weight"].double().numpy()
        down = stored[f"transformer.{path}.lora_A.weight"].double().numpy()
        np.testing.assert_allclose(up @ down, oracle.nearest(change, 3), atol=2e-5, err_msg=path)
        lost += float(np.sum((change - oracle.nearest(change, 3)) ** 2))
        norm += float(np.sum(change**2))
    assert outcome.certificate["truncation"] == pytest.approx(np.sqrt(lost / norm), rel=1e-3)


@pytest.mark.parametrize("normalise", ["strengths", "energy"])
def test_the_certificate_names_the_coefficients_that_a_method_has_found(
    normalise: str, packed: Path, own_base: Path, tmp_path: Path
) -> None:
    second = lora("lora_unet_layers_0_linear1", 40, 8, 2, seed=11, dtype=torch.float32)
    other = write(tmp_path / "other.safetensors", second)
    method = _method("linear", normalise=normalise)
    recipe, _ = make_recipe([(packed, 0.7), (other, -0.5)])
    out = tmp_path / "out.safetensors"
    outcome = run(out, [(packed, 0.7), (other, -0.5)], method=method, output={"dtype": "float32"})
    (module,) = outcome.certificate["modules"].values()
    deltas = [_dense(packed), _dense(other)]
    if normalise == "strengths":
        factor = 1 / 1.2
    else:
        apart = np.sqrt(sum(s**2 * np.sum(d**2) for s, d in zip((0.7, -0.5), deltas, strict=True)))
        factor = apart / np.linalg.norm(0.7 * deltas[0] - 0.5 * deltas[1])
    expected = [factor * recipe.inputs[i].strength for i in recipe.in_canonical_order()]
    assert module["coefficients"] == pytest.approx(expected, rel=1e-3)
    baked = run(tmp_path / "b", [(packed, 0.7), (other, -0.5)], base=own_base, method=method)
    assert set(baked.certificate["modules"]) == {f"transformer.{path}" for path in LINEAR1}
    for its in baked.certificate["modules"].values():
        assert its["coefficients"] == module["coefficients"]
    total = factor * (0.7 * deltas[0] - 0.5 * deltas[1])
    np.testing.assert_allclose(_dense(out), total, atol=1e-6)


def _dense(path: Path) -> np.ndarray:
    """The change of the one layer of a kohya file."""
    tensors = load_file(path)
    (up,) = (tensor for key, tensor in tensors.items() if "lora_up" in key)
    (down,) = (tensor for key, tensor in tensors.items() if "lora_down" in key)
    return (up.double() @ down.double()).numpy()


def _dora(folder: Path, own_base: Path) -> tuple[Path, np.ndarray]:
    """DoRA on to_q, and what it does to this base in float64."""
    stem = "transformer.blocks.0.attn.to_q"
    factors = lora(stem, 8, 8, 2, seed=3, dtype=torch.float32)
    scale = torch.rand(8, generator=torch.Generator().manual_seed(4)) + 0.5
    factors[f"{stem}.dora_scale"] = scale[:, None]
    path = write(folder / "dora.safetensors", factors)
    weight = load_file(own_base)["blocks.0.attn.to_q.weight"].double().numpy()
    up, down = factors[f"{stem}.lora_B.weight"], factors[f"{stem}.lora_A.weight"]
    delta = up.double().numpy() @ down.double().numpy()
    changed = dora_oracle.rows(weight, delta, scale.double().numpy())
    return path, changed - weight


def test_what_depends_on_a_base_is_merged_on_it(
    packed: Path, own_base: Path, tmp_path: Path
) -> None:
    path, change = _dora(tmp_path, own_base)
    recipe, files = make_recipe([(path, 0.5)], rank={"fixed": 8}, output={"dtype": "float32"})
    with pytest.raises(Unsupported, match="depends on the base; name it, or bake"):
        plan(recipe, files)
    document: dict[str, Any] = {
        "kind": "merge",
        "base": str(own_base),
        "rank": {"fixed": 8},
        "output": {"dtype": "float32"},
    }
    out = tmp_path / "out.safetensors"
    outcome = run(out, [(path, 0.5)], **document)
    stored = load_file(out)
    (up,) = (t for key, t in stored.items() if "lora_B" in key)
    (down,) = (t for key, t in stored.items() if "lora_A" in key)
    np.testing.assert_allclose((up @ down).numpy(), 0.5 * change, atol=1e-6)
    assert outcome.certificate["truncation"] < 1e-6
    with pytest.raises(BadRecipe, match="full rank"):
        plan(*make_recipe([(path, 0.5)], kind="merge", base=own_base))
    with pytest.raises(BadRecipe, match="no input depends"):
        plan(*make_recipe([(packed, 0.5)], kind="merge", base=own_base))


def test_a_method_of_the_core_refuses_what_has_no_factors(own_base: Path, tmp_path: Path) -> None:
    path, _ = _dora(tmp_path, own_base)
    with pytest.raises(Unsupported, match="tsv needs low-rank factors"):
        plan(*make_recipe([(path, 1.0)], base=own_base, method=_method("tsv")))


def test_ties_of_a_dora_and_a_lora_is_that_of_what_they_do(own_base: Path, tmp_path: Path) -> None:
    path, change = _dora(tmp_path, own_base)
    dense = write(tmp_path / "dense.safetensors", {
        "lora_unet_blocks_0_attn_to_q.lokr_w1": torch.ones(1, 1),
        "lora_unet_blocks_0_attn_to_q.lokr_w2": torch.from_numpy(change).float(),
    })  # fmt: skip
    other = lora("transformer.blocks.0.attn.to_q", 8, 8, 2, seed=5, dtype=torch.float32)
    second = write(tmp_path / "other.safetensors", other)
    out, method = tmp_path / "out.safetensors", _method("ties", density=0.5)
    with_dora = _changes(out, own_base, [(path, 0.8), (second, 0.6)], method=method)
    with_dense = _changes(out, own_base, [(dense, 0.8), (second, 0.6)], method=method)
    np.testing.assert_allclose(
        with_dora["blocks.0.attn.to_q"], with_dense["blocks.0.attn.to_q"], atol=1e-6
    )


@pytest.mark.parametrize("name", SHARES)
def test_shares_are_positive_and_one_for_a_layer(
    name: str, packed: Path, split: Path, own_base: Path
) -> None:
    method = _method(name)
    with pytest.raises(BadRecipe, match="positive") as negative:
        plan(*make_recipe([(packed, 1.0), (split, -1.0)], base=own_base, method=method))
    assert negative.value.param == "inputs[1].strength"
    in_part = {"ref": str(packed), "blocks": {"*to_q": 0.5}}
    with pytest.raises(BadRecipe, match=r"one strength for all of .*, whose rows have 0.5, 1"):
        plan(*make_recipe([in_part, (split, 1.0)], base=own_base, method=method))


def test_adapters_of_other_shapes_are_refused_by_name(packed: Path, tmp_path: Path) -> None:
    tensors = lora("transformer.blocks.0.attn.to_k", 8, 8, 2, seed=5)
    tensors["transformer.blocks.0.attn.to_k.lora_A.weight"] = torch.zeros(2, 9)
    path = write(tmp_path / "odd.safetensors", tensors)
    with pytest.raises((ShapeMismatch, BadRecipe), match="odd"):
        plan(*make_recipe([(packed, 1.0), (path, 1.0)], method=_method("linear")))


def _vectors(folder: Path, **tensors: torch.Tensor) -> dict[str, str]:
    path = folder / "vectors.safetensors"
    save_file({key.replace("__", "."): tensor for key, tensor in tensors.items()}, path)
    return {"ref": str(path)}


@pytest.mark.parametrize("kind", ["merge", "bake"])
def test_vectors_weigh_directions_rows_and_columns(
    kind: str, split: Path, own_base: Path, tmp_path: Path
) -> None:
    name = "transformer.blocks.0.proj_mlp"
    given = {
        "directions": torch.tensor([2.0, -1.0]),
        "rows": torch.rand(16),
        "columns": torch.rand(8),
    }
    vectors = _vectors(tmp_path, **{f"{name}.{key}": value for key, value in given.items()})
    inputs = [{"ref": str(split), "strength": 0.5, "vectors": vectors}]
    out = tmp_path / "out.safetensors"
    if kind == "bake":
        found = _changes(out, own_base, inputs)
    else:
        merged = tmp_path / "merged.safetensors"
        run(merged, inputs, output={"dtype": "float32"})
        found = _changes(out, own_base, [(merged, 1.0)])
    stored = {key: tensor.double().numpy() for key, tensor in load_file(split).items()}
    for path in ("blocks.0.proj_mlp", "blocks.0.attn.to_k"):
        up, down = (stored[f"transformer.{path}.lora_{letter}.weight"] for letter in "BA")
        if path == "blocks.0.proj_mlp":
            directions, rows, columns = (value.double().numpy() for value in given.values())
            up, down = up * rows[:, None] * directions, down * columns
        np.testing.assert_allclose(found[path], 0.5 * up @ down, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("key", "length", "says"),
    [
        ("transformer.blocks.0.proj_mlp.columns", 9, "8 floats are needed"),
        ("transformer.blocks.0.proj_mlp.colums", 8, "of no layer"),
        ("transformer.blocks.0.proj_out.columns", 8, "of no layer"),
    ],
)
def test_vectors_that_fit_nothing_are_refused(
    key: str, length: int, says: str, split: Path, tmp_path: Path
) -> None:
    vectors = _vectors(tmp_path, **{key: torch.ones(length)})
    with pytest.raises(BadRecipe, match=says) as refused:
        plan(*make_recipe([{"ref": str(split), "vectors": vectors}]))
    assert refused.value.param == "inputs[0].vectors"


def test_a_shared_rank_spends_the_same_numbers_where_they_save_most(
    packed: Path, split: Path, tmp_path: Path
) -> None:
    louder = {"ref": str(packed), "blocks": {"*.to_q": 5.0}}
    inputs: list[Any] = [louder, (split, 1.0)]
    output = {"dialect": "diffusers", "dtype": "float32"}
    found = {}
    for name in ("fixed", "shared"):
        out = tmp_path / f"{name}.safetensors"
        outcome = run(out, inputs, rank={name: 2}, output=output)
        numbers = sum(tensor.numel() for tensor in load_file(out).values())
        found[name] = (numbers, outcome.certificate["truncation"])
    assert found["shared"][0] <= found["fixed"][0]
    assert found["shared"][1] < found["fixed"][1]


def test_a_preset_keeps_the_blocks_that_the_family_names(
    packed: Path, split: Path, own_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: list[Any] = [
        {"ref": str(packed), "only": ["@style"]},
        {"ref": str(split), "only": ["@content"]},
    ]
    with pytest.raises(
        BadRecipe, match="@(style|content): only sdxl has it; this is packed"
    ) as refused:
        plan(*make_recipe(inputs, base=own_base))
    assert refused.value.param.endswith("].only")
    globs = {"@style": ("*.to_q",), "@content": ("*.to_out.0", "*.to_k")}
    monkeypatch.setitem(presets.PRESETS, "packed", globs)  # type: ignore[arg-type]
    outcome = run(tmp_path / "certified.safetensors", inputs, base=own_base)
    assert sorted(outcome.certificate["coverage"]["transformer"]) == [1, 2]
    found = _changes(tmp_path / "out.safetensors", own_base, inputs)
    changed = {path for path, change in found.items() if np.any(change)}
    assert changed == {"blocks.0.attn.to_q", "blocks.0.attn.to_k", "blocks.0.attn.to_out.0"}


def test_presets_name_modules_of_their_family() -> None:
    for name, its in presets.PRESETS.items():
        modules = {
            f"{component}.{module}"
            for component, table in FAMILIES[name].components.items()
            for module in table
        }
        for globs in its.values():
            for glob in globs:
                assert any(module.startswith(glob.removesuffix("*")) for module in modules), glob


def test_the_plan_of_a_resize_is_that_of_one_adapter(packed: Path, tmp_path: Path) -> None:
    recipe, files = make_recipe([(packed, 1.0)], kind="resize", rank={"fixed": 1})
    planned = plan(recipe, files)
    assert isinstance(planned, MergePlan)
    assert [module.rank for module in planned.modules] == [3]
    assert json.loads(recipe.canonical_json())["kind"] == "resize"


@pytest.mark.parametrize("name", ["svc", "ties", "karcher"])
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_a_unit_is_kept_for_as_long_as_a_layer_may_need_it(
    dialect: str, name: str, packed: Path, split: Path
) -> None:
    """The packed layer is one of kohya's file, and four of diffusers'."""
    rank = {"fixed": 2} if name == "ties" else {"exact": True}
    fields = {"method": _method(name), "output": {"dialect": dialect}, "rank": rank}
    planned = plan(*make_recipe([(packed, 0.7), (split, 0.5)], **fields))
    assert isinstance(planned, MergePlan)
    kept = set()
    with Inputs(planned.adapters, planned.recipe) as inputs:
        for module in planned.modules:
            term = module.terms[0]
            change = weakref.ref(inputs.change(term.adapter, term.entry, torch.float64))
            inputs.forget(module.terms, torch.float64)
            if change() is not None:
                kept.add(module.name)
    ends = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    shared = {f"transformer.blocks.0.{end}" for end in ends}
    assert kept == (shared if dialect == "diffusers" else set())


@pytest.mark.parametrize("numerics", ["fast", "reproducible"])
def test_the_cost_of_a_method_of_the_core_is_in_float64(
    numerics: str, packed: Path, split: Path, own_base: Path, packed_base: Path
) -> None:
    def cost(name: str, **fields: Any) -> int:
        inputs = [(packed, 0.7), (split, 0.5)]
        fields |= {"method": _method(name), "numerics": numerics}
        return plan(*make_recipe(inputs, **fields)).cost.memory_bytes

    factors = (40 + 8) * (3 + 4)  # rows and columns of the packed layer, summed ranks
    copies = 2 * 8 * 8 * factors
    kohya = {"output": {"dialect": "kohya"}}
    assert cost("svc", **kohya) == cost("karcher", **kohya) + copies
    assert cost("svc", base=packed_base) == cost("karcher", base=packed_base) + copies
    # Where a base has the four apart, the unit is kept for them.
    small, large = cost("svc", base=own_base), cost("linear", base=own_base)
    assert small > large + copies + 2 * 8 * factors
