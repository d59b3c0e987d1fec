"""Inputs that cancel, hardly exist or are far too large: a right answer or one clear error."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.errors import BadRecipe, Overflow
from merge.families import FAMILIES, Family
from merge.method_parameters import Space
from merge.methods import METHODS
from merge.plan import plan
from merge.presets import expand
from merge.recipe import Input
from tests.fixtures.engine import make_recipe, run
from tests.fixtures.packed import lora, own_state, packed_family, write

METHOD_NAMES = sorted(METHODS)
Q = "transformer.blocks.0.attn.to_q"
PACKED = "lora_unet_layers_0_linear1"  # q, k, v and the MLP


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> Family:
    found = packed_family()
    monkeypatch.setitem(FAMILIES, found.name, found)
    return found


@pytest.fixture
def base(tmp_path: Path, family: Family) -> Path:
    return write(tmp_path / "base.safetensors", own_state(family, torch.float32))


def _factors(path: Path, up: torch.Tensor, down: torch.Tensor) -> Path:
    return write(path, {f"{Q}.lora_B.weight": up, f"{Q}.lora_A.weight": down})


def _change(base: Path, inputs: list[Any], **fields: Any) -> np.ndarray:
    out = base.with_name("out.safetensors")
    run(out, inputs, base=base, **fields)
    before, after = (load_file(path)["blocks.0.attn.to_q.weight"] for path in (base, out))
    return np.asarray((after.double() - before.double()).numpy())


@pytest.mark.parametrize("numerics", ["fast", "reproducible"])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_an_adapter_whose_factors_cancel_counts_as_absent(
    name: str, numerics: str, base: Path, tmp_path: Path
) -> None:
    """As an exact merge of opposites leaves them: what rounding makes of it is no change."""
    generator = torch.Generator().manual_seed(0)
    up, down, other_up, other_down = (
        torch.randn(*shape, generator=generator) for shape in [(8, 2), (2, 8)] * 2
    )
    adapter = _factors(tmp_path / "adapter.safetensors", other_up, other_down)
    # Thirds, so that the products differ in their last bits.
    ups, downs = torch.cat([up / 3, -up], 1), torch.cat([down, down / 3])
    nothing = _factors(tmp_path / "nothing.safetensors", ups, downs)
    left = torch.linalg.norm(ups.double() @ downs.double())
    assert 0 < left < 1e-6
    method = {"name": name}
    alone = _change(base, [(adapter, 1.0)], method=method, numerics=numerics)
    both = _change(base, [(adapter, 1.0), (nothing, 1.0)], method=method, numerics=numerics)
    np.testing.assert_allclose(both, alone, atol=1e-6)
    silent = _change(base, [(nothing, 1.0)], method=method, numerics=numerics)
    np.testing.assert_allclose(silent, 0, atol=1e-6)


RANKS = [{"fixed": 2}, {"energy": 0.9}, {"budget_bytes": 200}, {"shared": 1}]


@pytest.mark.parametrize("rank", RANKS, ids=lambda rank: next(iter(rank)))
@pytest.mark.parametrize("name", ["linear", "karcher", "ties", "dare"])
def test_numbers_too_large_for_the_arithmetic_are_one_error_that_names_the_layer(
    name: str, rank: dict[str, Any], tmp_path: Path
) -> None:
    large = torch.full((8, 2), 1e20)
    paths = [
        _factors(tmp_path / "one.safetensors", large, large.mT),
        _factors(tmp_path / "two.safetensors", large * 0.5, large.mT),
    ]
    fields: dict[str, Any] = {"method": {"name": name}, "rank": rank}
    recipe, files = make_recipe([(path, 1.0) for path in paths], **fields)
    if METHODS[name].parameters.space is Space.ELEMENTS and not rank.keys() & {"fixed", "energy"}:
        with pytest.raises(BadRecipe, match="full rank"):
            plan(recipe, files)
        return
    with pytest.raises(Overflow, match=rf"{Q} does not fit float32, which fast numerics use"):
        run(tmp_path / "out.safetensors", [(path, 1.0) for path in paths], **fields)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_coefficient_is_of_the_rows_that_it_stands_beside(base: Path, tmp_path: Path) -> None:
    """Of q at half the strength of k and v, in one pair of factors; k has another adapter too."""
    packed = lora(PACKED, 40, 8, 3, seed=1, dtype=torch.float32)
    first = write(tmp_path / "packed.safetensors", packed)
    key = lora("transformer.blocks.0.attn.to_k", 8, 8, 2, seed=5, dtype=torch.float32)
    second = write(tmp_path / "key.safetensors", key)
    inputs: list[Any] = [
        {"ref": str(first), "strength": 0.5, "blocks": {"*.to_q": 0.5}},
        (second, 1.0),
    ]
    recipe, _ = make_recipe(inputs)
    order = recipe.in_canonical_order()
    method = {"name": "linear", "normalise": "energy"}
    output = {"dialect": "diffusers"}
    baked = run(tmp_path / "baked.safetensors", inputs, base=base, method=method)
    merged = run(tmp_path / "merged.safetensors", inputs, method=method, output=output)
    for outcome in (baked, merged):
        modules = outcome.certificate["modules"]
        found = {
            path: [modules[f"transformer.blocks.0.attn.{path}"]["coefficients"][order.index(i)] for i in (0, 1)]
            for path in ("to_q", "to_k", "to_v")
        }  # fmt: skip
        (half, none), (whole, other) = found["to_q"], found["to_k"]
        assert none is None
        assert whole == pytest.approx(2 * half, rel=1e-3)
        assert other == pytest.approx(2 * whole, rel=1e-3)
        assert found["to_v"] == [whole, None]


def test_vectors_find_the_weight_beside_a_change_of_the_bias(base: Path, tmp_path: Path) -> None:
    tensors = lora(PACKED, 40, 8, 2, seed=1, dtype=torch.float32)
    tensors[f"{PACKED}.diff_b"] = torch.ones(40)
    adapter = write(tmp_path / "adapter.safetensors", tensors)
    columns = torch.arange(8.0)
    save_file({"transformer.layers.0.linear1.columns": columns}, tmp_path / "v.safetensors")
    vectors = {"ref": str(tmp_path / "v.safetensors")}
    found = _change(base, [{"ref": str(adapter), "vectors": vectors}])
    up, down = (tensors[f"{PACKED}.lora_{part}.weight"].double() for part in ("up", "down"))
    np.testing.assert_allclose(found, (up[:8] @ down * columns).numpy(), atol=1e-6)


def test_a_preset_and_its_own_pattern_multiply_as_any_two_blocks_do() -> None:
    pattern = "unet.up_blocks.0.attentions.1.*"
    source = Input(ref="a", blocks={"@style": 0.5, pattern: 0.5})
    assert expand(source, "sdxl", "inputs[0]").blocks == {pattern: 0.25}


def test_what_goes_wrong_in_a_folder_is_said_of_the_name_that_was_asked_for(
    tmp_path: Path,
) -> None:
    large = torch.full((8, 2), 1e20)
    adapter = _factors(tmp_path / "one.safetensors", large, large.mT)
    fields: dict[str, Any] = {"rank": {"fixed": 1}, "output": {"dialect": "peft"}}
    with pytest.raises(Overflow, match=rf"^wanted: {Q} does not fit float32"):
        run(tmp_path / "wanted", [(adapter, 1.0)], **fields)
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]
