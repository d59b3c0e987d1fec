"""The same adapter in packed and split names, baked into packed and split bases: one result."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.errors import ShapeMismatch, Unsupported
from merge.families import FAMILIES, Family
from merge.plan import BakePlan, plan
from tests.fixtures.engine import make_recipe, run
from tests.fixtures.packed import lora, own_state, packed_family, packed_state, random, write

State = dict[str, torch.Tensor]
PREFIX = "transformer."
LINEAR1 = ["blocks.0.attn.to_q", "blocks.0.attn.to_k", "blocks.0.attn.to_v", "blocks.0.proj_mlp"]


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> Family:
    found = packed_family()
    monkeypatch.setitem(FAMILIES, found.name, found)
    return found


def _some(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _bases(folder: Path, family: Family, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    own = own_state(family, dtype)
    save_file(own, folder / "own.safetensors")
    save_file(packed_state(family, own), folder / "packed.safetensors")
    return folder / "own.safetensors", folder / "packed.safetensors"


def _baked_alike(folder: Path, family: Family, inputs: list[Any], dtype: torch.dtype) -> State:
    """What both bases become, after they were found equal, in our own names."""
    found = []
    for base in _bases(folder, family, dtype):
        out = folder / f"baked-{base.name}"
        run(out, inputs, base=base, numerics="reproducible")
        found.append(load_file(out))
    own, packed = found
    expected = packed_state(family, own)
    assert packed.keys() == expected.keys()
    for key, tensor in packed.items():
        assert torch.equal(tensor, expected[key]), key
    return own


def _write(folder: Path, stem: str, tensors: State) -> Path:
    path = folder / "adapter.safetensors"
    save_file({f"{stem}.{suffix}": tensor for suffix, tensor in tensors.items()}, path)
    return path


def _factors(algorithm: str, out: int, inner: int) -> State:
    """Factors of a layer (out, in), whose numbers of rows 24 + 16 and columns 8 hold blocks of 8."""
    make = iter(range(7, 99))

    def some(*shape: int) -> torch.Tensor:
        return _some(*shape, seed=next(make))

    return {
        "lora": lambda: {
            "lora_down.weight": some(3, inner),
            "lora_up.weight": some(out, 3),
            "alpha": torch.tensor(1.5),
        },
        "loha": lambda: {
            "hada_w1_a": some(out, 2),
            "hada_w1_b": some(2, inner),
            "hada_w2_a": some(out, 2),
            "hada_w2_b": some(2, inner),
        },
        "lokr": lambda: {"lokr_w1": some(4, 2), "lokr_w2": some(out // 4, inner // 2)},
        "dora": lambda: {
            "lora_down.weight": some(3, inner),
            "lora_up.weight": some(out, 3),
            "dora_scale": some(out, 1),
        },
        "dora of inputs": lambda: {
            "lora_down.weight": some(3, inner),
            "lora_up.weight": some(out, 3),
            "dora_scale": some(1, inner),
        },
        "glora": lambda: {
            "a1.weight": some(inner, 3),
            "a2.weight": some(3, inner),
            "b1.weight": some(out, 3),
            "b2.weight": some(3, inner),
        },
        "oft": lambda: {"oft_blocks": some(out // 4, 4, 4)},
        "boft": lambda: {"oft_blocks": some(2, out // 4, 4, 4)},
        "ia3": lambda: {"weight": some(out), "on_input": torch.tensor(False)},
        "full": lambda: {"diff": some(out, inner), "diff_b": some(out)},
        "replacement": lambda: {"set_weight": some(out, inner)},
    }[algorithm]()


ALGORITHMS = [
    *("lora", "loha", "lokr", "dora", "dora of inputs", "glora", "oft", "boft", "ia3", "full"),
    "replacement",
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_of_any_algorithm_in_either_base(
    algorithm: str, dtype: torch.dtype, family: Family, tmp_path: Path
) -> None:
    adapter = _write(tmp_path, "diffusion_model.layers.0.linear1", _factors(algorithm, 40, 8))
    after = _baked_alike(tmp_path, family, [(adapter, -0.7)], dtype)
    before = own_state(family, dtype)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    parameters = ("weight", "bias") if algorithm == "full" else ("weight",)
    assert changed == {f"{module}.{parameter}" for module in LINEAR1 for parameter in parameters}


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a != "ia3"])
def test_one_part_of_a_packed_layer_in_either_base(
    algorithm: str, family: Family, tmp_path: Path
) -> None:
    adapter = _write(tmp_path, f"{PREFIX}blocks.0.attn.to_k", _factors(algorithm, 8, 8))
    after = _baked_alike(tmp_path, family, [(adapter, 0.5)], torch.float32)
    before = own_state(family, torch.float32)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    names = {"blocks.0.attn.to_k.weight"}
    assert changed == names | ({"blocks.0.attn.to_k.bias"} if algorithm == "full" else set())


def test_halves_that_a_naming_swaps_end_where_they_belong(family: Family, tmp_path: Path) -> None:
    tensors = _factors("lora", 16, 8)
    adapter = _write(tmp_path, "diffusion_model.final.adaLN.1", tensors)
    after = _baked_alike(tmp_path, family, [(adapter, 1.0)], torch.float32)
    delta = 0.5 * tensors["lora_up.weight"].double() @ tensors["lora_down.weight"].double()
    swapped = torch.cat([delta[8:], delta[:8]])
    before = own_state(family, torch.float32)["norm_out.linear.weight"].double()
    wanted = (before + swapped).float()
    assert torch.equal(after["norm_out.linear.weight"], wanted)


def test_halves_and_the_whole_of_one_module_add_up(family: Family, tmp_path: Path) -> None:
    """The one adapter comes in two runs of rows, so that the other one's rows are cut."""
    inputs, deltas = [], []
    for stem in ("diffusion_model.final.adaLN.1", f"{PREFIX}norm_out.linear"):
        tensors = _factors("lora", 16, 8)
        (tmp_path / stem).mkdir()
        inputs.append((_write(tmp_path / stem, stem, tensors), 1.0))
        up, down = (tensors[f"lora_{side}.weight"].double() for side in ("up", "down"))
        deltas.append(0.5 * up @ down)
    after = _baked_alike(tmp_path, family, inputs, torch.float32)
    before = own_state(family, torch.float32)["norm_out.linear.weight"].double()
    wanted = before + torch.cat([deltas[0][8:], deltas[0][:8]]) + deltas[1]
    np.testing.assert_allclose(after["norm_out.linear.weight"], wanted, rtol=0, atol=1e-6)


def test_a_block_strength_on_q_reaches_only_its_rows_of_a_packed_layer(
    family: Family, tmp_path: Path
) -> None:
    tensors = _factors("lora", 40, 8)
    adapter = _write(tmp_path, "diffusion_model.layers.0.linear1", tensors)
    source = {"ref": str(adapter), "strength": 0.5, "blocks": {"*.to_q": 2.0, "*.to_v": 0.0}}
    after = _baked_alike(tmp_path, family, [source], torch.float32)
    delta = 0.5 * tensors["lora_up.weight"].double() @ tensors["lora_down.weight"].double()
    before = own_state(family, torch.float32)
    for part, (module, strength) in enumerate(zip(LINEAR1, (1.0, 0.5, 0.0, 0.5), strict=True)):
        rows = delta[8 * part : 8 * part + len(before[f"{module}.weight"])]
        wanted = (before[f"{module}.weight"].double() + strength * rows).float()
        assert torch.equal(after[f"{module}.weight"], wanted), module


def test_adapters_that_overlap_in_some_rows_add_up(family: Family, tmp_path: Path) -> None:
    """One changes all of the packed layer, one q alone, one replaces k; k and q are cut apart."""
    tensors = {"packed": _factors("lora", 40, 8), "q": _factors("loha", 8, 8)}
    stems = {"packed": "diffusion_model.layers.0.linear1", "q": f"{PREFIX}blocks.0.attn.to_q"}
    inputs = []
    for name, its in tensors.items():
        (tmp_path / name).mkdir()
        inputs.append((_write(tmp_path / name, stems[name], its), 1.0))
    (tmp_path / "k").mkdir()
    values = {"set_weight": _some(8, 8, seed=50)}
    inputs.append((_write(tmp_path / "k", f"{PREFIX}blocks.0.attn.to_k", values), 1.0))
    after = _baked_alike(tmp_path, family, inputs, torch.float32)
    before = own_state(family, torch.float32)
    up, down = (tensors["packed"][f"lora_{side}.weight"].double() for side in ("up", "down"))
    delta = 0.5 * up @ down
    a, b, c, d = (
        tensors["q"][f"hada_{role}"].double() for role in ("w1_a", "w1_b", "w2_a", "w2_b")
    )
    q = before["blocks.0.attn.to_q.weight"].double() + delta[:8] + (a @ b) * (c @ d)
    np.testing.assert_allclose(after["blocks.0.attn.to_q.weight"], q, rtol=0, atol=1e-6)
    k = values["set_weight"].double() + delta[8:16]
    np.testing.assert_allclose(after["blocks.0.attn.to_k.weight"], k, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("numerics", ["fast", "reproducible"])
def test_a_replacement_at_strength_one_is_its_own_bytes(
    dtype: torch.dtype, numerics: str, family: Family, tmp_path: Path
) -> None:
    """Also where the old value is so much larger that old + (new - old) is not the new one."""
    own, _ = _bases(tmp_path, family, dtype)
    state = load_file(own)
    state["blocks.0.attn.to_q.weight"].fill_(3e4)
    save_file(state, own)
    values = (_some(8, 8, seed=3) * 1e-4).to(dtype)
    bias = (_some(8, seed=4) * 1e-4).to(dtype)
    path = tmp_path / "a.safetensors"
    stem = f"{PREFIX}blocks.0.attn.to_q"
    save_file({f"{stem}.weight": values, f"{stem}.bias": bias}, path)
    run(tmp_path / "out.safetensors", [(path, 1.0)], base=own, numerics=numerics)
    after = load_file(tmp_path / "out.safetensors")
    assert torch.equal(after["blocks.0.attn.to_q.weight"], values)
    assert torch.equal(after["blocks.0.attn.to_q.bias"], bias)


def test_a_bias_for_a_layer_without_one_is_refused(family: Family, tmp_path: Path) -> None:
    own, _ = _bases(tmp_path, family)
    state = load_file(own)
    del state["blocks.0.attn.to_q.bias"]
    save_file(state, own)
    adapter = _write(tmp_path, f"{PREFIX}blocks.0.attn.to_q", _factors("full", 8, 8))
    with pytest.raises(Unsupported, match="gives transformer.blocks.0.attn.to_q a bias"):
        plan(*make_recipe([(adapter, 1.0)], base=own))


def test_a_norm_takes_new_values(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"{PREFIX}blocks.0.norm.diff": _some(8, seed=1)}, path)
    after = _baked_alike(tmp_path, family, [(path, 1.0)], torch.float32)
    wanted = own_state(family, torch.float32)["blocks.0.norm.weight"] + _some(8, seed=1)
    assert torch.equal(after["blocks.0.norm.weight"], wanted)


def test_a_patch_for_every_run_of_rows(family: Family, tmp_path: Path) -> None:
    _, packed = _bases(tmp_path, family)
    adapter = _write(tmp_path, "diffusion_model.layers.0.linear1", _factors("lora", 40, 8))
    planned = plan(*make_recipe([(adapter, 1.0)], base=packed))
    assert isinstance(planned, BakePlan)
    (patches,) = planned.patches["packed.safetensors"].values()
    assert [(patch.first_row, patch.rows) for patch in patches] == [
        (0, 8),
        (8, 8),
        (16, 8),
        (24, 16),
    ]


@pytest.mark.parametrize("method", ["linear", "svc", "ties"])
def test_a_change_of_the_transposed_shape_is_refused_when_planned(
    method: str, tmp_path: Path
) -> None:
    base = write(tmp_path / "base.safetensors", {"layer.weight": random(6, 4)})
    adapter = write(tmp_path / "a.safetensors", lora("layer", 4, 6, 2, seed=1))
    recipe, files = make_recipe([(adapter, 1.0)], base=base, method={"name": method})
    with pytest.raises(ShapeMismatch, match=r"the change is \(4, 6\), layer.weight in base"):
        plan(recipe, files)
