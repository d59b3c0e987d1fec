"""Factors of every algorithm in files, baked into files, against each algorithm's own oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.bake import bake
from merge.blocks import Options
from merge.errors import BadRecipe, Unsupported
from merge.execute import execute
from merge.plan import BakePlan, plan
from tests.fixtures.engine import make_recipe, run
from tests.fixtures.factors import Layer, layers, write_base, write_factors

LAYOUTS = [
    *("lora", "loha", "lokr", "vera", "full", "norm", "replacement", "lora-embedding"),
    *("glora", "glora-paper", "oft", "oft-legacy", "boft", "boft-legacy"),
    *("ia3", "ia3-peft", "oft-peft", "boft-peft", "hra", "hira"),
]
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def _expected(layer: Layer, strength: float) -> tuple[np.ndarray, np.ndarray | None]:
    weight = layer.weight + strength * (layer.changed - layer.weight)
    if layer.bias is None or layer.changed_bias is None:
        return weight, layer.bias
    return weight, layer.bias + strength * (layer.changed_bias - layer.bias)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_becomes_what_the_oracle_says(layout: str, tmp_path: Path) -> None:
    held = layers(layout)
    base = write_base(tmp_path / "base.safetensors", held)
    adapter = write_factors(tmp_path / "adapter.safetensors", layout, held)
    for strength in (1.0, 0.5, -0.7):
        out = tmp_path / f"{strength}.safetensors"
        run(out, [(adapter, strength)], base=base, numerics="reproducible")
        after = load_file(out)
        for name, layer in held.items():
            weight, bias = _expected(layer, strength)
            # Factors and weights are stored as float32, of which the oracle knows nothing.
            slack = 4e-6 * max(1.0, float(np.abs(weight).max()))
            np.testing.assert_allclose(after[f"{name}.weight"], weight, rtol=0, atol=slack)
            if bias is not None:
                np.testing.assert_allclose(after[f"{name}.bias"], bias, rtol=0, atol=slack)
        assert torch.equal(after["untouched.weight"], torch.arange(10.0))


# Of one adapter with nothing pruned they are the plain sum, computed in another way.
PLAIN = [
    {"name": "ties", "density": 1.0},
    {"name": "linear", "normalise": "energy"},
    {"name": "karcher"},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", PLAIN, ids=lambda method: method["name"])
def test_one_adapter_is_itself_by_any_method_whatever_its_algorithm(
    method: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    held = layers(layout)
    base = write_base(tmp_path / "base.safetensors", held)
    adapter = write_factors(tmp_path / "adapter.safetensors", layout, held)
    recipe, files = make_recipe([(adapter, 1.0)], base=base, method=method)
    if layout == "lora-embedding":
        with pytest.raises(Unsupported, match="an embedding, which"):
            plan(recipe, files)
        return
    out = tmp_path / "out.safetensors"
    run(out, [(adapter, 1.0)], base=base, method=method, numerics="reproducible")
    after = load_file(out)
    for name, layer in held.items():
        weight, bias = _expected(layer, 1.0)
        slack = 4e-6 * max(1.0, float(np.abs(weight).max()))
        np.testing.assert_allclose(after[f"{name}.weight"], weight, rtol=0, atol=slack)
        if bias is not None:
            np.testing.assert_allclose(after[f"{name}.bias"], bias, rtol=0, atol=slack)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_of_any_algorithm_becomes_plain_lora_on_its_base(
    layout: str, tmp_path: Path
) -> None:
    """At full rank nothing is lost; what PEFT's LoRA has no place for is refused by name."""
    held = layers(layout)
    base = write_base(tmp_path / "base.safetensors", held)
    adapter = write_factors(tmp_path / "adapter.safetensors", layout, held)
    fields: dict[str, Any] = {"kind": "merge", "rank": {"fixed": 999}}
    fields["output"] = {"dtype": "float32"}
    if layout in NEED_BASE:
        fields["base"] = base
    recipe, files = make_recipe([(adapter, 0.5)], **fields)
    if layout in REFUSED:
        with pytest.raises((BadRecipe, Unsupported), match=REFUSED[layout]):
            plan(recipe, files)
        return
    execute(plan(recipe, files), tmp_path / "merged")
    merged = tmp_path / "merged" / "adapter_model.safetensors"
    out, two = tmp_path / "out.safetensors", tmp_path / "two.safetensors"
    run(out, [(adapter, 0.5)], base=base, numerics="reproducible")
    run(two, [(merged, 1.0)], base=base, numerics="reproducible")
    at_once, in_two = load_file(out), load_file(two)
    for key, tensor in at_once.items():
        slack = 4e-6 * max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(in_two[key], tensor, rtol=0, atol=slack)


NEED_BASE = [
    *(
        "lora",
        "loha",
        "vera",
        "full",
        "replacement",
        "glora",
        "glora-paper",
        "oft",
        "oft-legacy",
        "boft",
        "boft-legacy",
    ),
    *("ia3", "ia3-peft", "oft-peft", "boft-peft", "hra", "hira"),
]
REFUSED = {
    "full": "gets new values",
    "replacement": "gets new values",
    "norm": "a difference that is stored whole",
    "lora-embedding": "is an embedding",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strength_zero_gives_the_base_whatever_the_algorithm(layout: str, tmp_path: Path) -> None:
    held = layers(layout)
    base = write_base(tmp_path / "base.safetensors", held, torch.bfloat16)
    adapter = write_factors(tmp_path / "adapter.safetensors", layout, held)
    run(tmp_path / "out.safetensors", [(adapter, 0.0)], base=base)
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("layout", ["lora", "lokr", "glora", "oft", "boft", "hira", "full"])
def test_reproducible_bytes_whatever_the_algorithm(layout: str, tmp_path: Path) -> None:
    """For any number of threads, any tile and any block, which cut rows and elements."""
    held = layers(layout)
    base = write_base(tmp_path / "base.safetensors", held, torch.bfloat16)
    adapter = write_factors(tmp_path / "adapter.safetensors", layout, held)
    planned = plan(*make_recipe([(adapter, 0.7)], base=base, numerics="reproducible"))
    assert isinstance(planned, BakePlan)
    found = set()
    for workers, tile, block in [(1, 2**18, 2**22), (3, 1, 4096), (2, 40, 999), (4, 7, 31)]:
        options = Options(workers, True, lambda step: None, lambda: False, block)
        digests, _ = bake(planned, tmp_path / "out.safetensors", options, tile=tile)
        found |= set(digests.values())
    assert len(found) == 1


def test_an_overflown_alpha_beside_two_whole_factors_counts_for_nothing(tmp_path: Path) -> None:
    left, right = torch.randn(2, 2), torch.randn(3, 3)
    stem = "model.layers.0.mlp.up_proj"
    adapter = {
        f"{stem}.lokr_w1": left,
        f"{stem}.lokr_w2": right,
        f"{stem}.alpha": torch.tensor(1e5, dtype=torch.float16),  # inf
    }
    base = {f"{stem}.weight": torch.randn(6, 6)}
    save_file(adapter, tmp_path / "adapter.safetensors")
    save_file(base, tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    run(out, [(tmp_path / "adapter.safetensors", 1.0)], base=tmp_path / "base.safetensors")
    expected = base[f"{stem}.weight"] + torch.kron(left, right)
    torch.testing.assert_close(load_file(out)[f"{stem}.weight"], expected)


@pytest.mark.parametrize("rank", [2, 64])  # by the factors, and by looking at every tile
def test_the_certificate_says_the_norm_of_a_change(rank: int, tmp_path: Path) -> None:
    up, down, stem = torch.randn(70, rank), torch.randn(rank, 90), "model.layers.0.mlp.up_proj"
    adapter = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["up_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"{stem}.weight": torch.randn(70, 90)}, tmp_path / "base.safetensors")
    sources = [(tmp_path / "adapter_model.safetensors", 0.5)]
    outcome = run(tmp_path / "out.safetensors", sources, base=tmp_path / "base.safetensors")
    expected = 0.5 * torch.linalg.norm(up.double() @ down.double()).item()
    (module,) = outcome.certificate["modules"].values()
    assert module["norm"] == pytest.approx(expected, rel=1e-3)
