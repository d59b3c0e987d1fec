"""Real diffusers transformers, tiny: an adapter baked into either layout acts as diffusers' own does.

The live model with diffusers' and PEFT's adapter is the second implementation; the single file in
the original names is packed by our rules and baked through packed rows and swapped halves.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from merge.families.checkpoints import Component
from merge.families.layers import ORIGINAL
from tests.fixtures.engine import run
from tests.fixtures.families import (
    Tiny,
    registered,
    stored_state,
    tiny_flux,
    tiny_lumina2,
    tiny_pixart,
    tiny_sd3,
)

RANK = 3
# Weights are about 1, their changes and the rounding of float32 sums of them far smaller.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TINY = {"flux1": tiny_flux, "sd3": tiny_sd3, "pixart": tiny_pixart, "lumina2": tiny_lumina2}
LIVE = ["flux1", "sd3", "lumina2"]  # diffusers loads no adapter into its PixArt model
State = dict[str, torch.Tensor]


def _inputs(kind: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "flux1":
        return {
            "hidden_states": random(1, 6, 16),
            "encoder_hidden_states": random(1, 5, 32),
            "pooled_projections": random(1, 16),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([3.5]),
            "img_ids": torch.zeros(6, 3),
            "txt_ids": torch.zeros(5, 3),
        }
    found = {"hidden_states": random(1, 4, 8, 8), "timestep": torch.tensor([0.5])}
    found["encoder_hidden_states"] = random(1, 5, 24)
    if kind == "sd3":
        return found | {"pooled_projections": random(1, 16)}
    return found | {"encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool)}


def _adapter(tiny: Tiny, *, packed: bool) -> State:
    """Random factors for every layer, by diffusers' keys or kohya's for the packed layers."""
    generator = torch.Generator().manual_seed(5)
    component = tiny.family.layers["transformer"]
    tensors: State = {}
    for path, layer in component[ORIGINAL if packed else "own"].items():
        if layer.kind not in ("linear", "conv"):
            continue
        stem = f"lora_unet_{path.replace('.', '_')}" if packed else f"transformer.{path}"
        down, up = ("lora_down", "lora_up") if packed else ("lora_A", "lora_B")
        out, inner, *kernel = layer.shape
        tensors[f"{stem}.{down}.weight"] = (
            torch.randn(RANK, inner, *kernel, generator=generator) * 0.2
        )
        ones = [1] * len(kernel)
        tensors[f"{stem}.{up}.weight"] = torch.randn(out, RANK, *ones, generator=generator) * 0.2
        if packed:
            tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    return tensors


def _bake(tiny: Tiny, model: Any, adapter: State, folder: Path) -> tuple[State, State]:
    """The same adapter baked into diffusers' file of the transformer and into the original's."""
    state = tiny.state(model)
    held = Component("transformer", "model.diffusion_model.", ORIGINAL)
    save_file(adapter, folder / "adapter.safetensors")
    found = []
    for name, tensors in (("own", state), ("original", stored_state(tiny.family, held, state))):
        base = folder / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, base)
        out = folder / f"{name}-baked.safetensors"
        run(out, [(folder / "adapter.safetensors", 0.7)], base=base)
        found.append(load_file(out))
    own, original = found
    return own, original


@pytest.mark.parametrize("kind", LIVE)
def test_a_baked_transformer_does_what_diffusers_does_with_the_live_adapter(
    kind: str, tmp_path: Path
) -> None:
    tiny = TINY[kind]()
    model, adapter = tiny.make(), _adapter(tiny, packed=False)
    with registered(tiny.family), torch.no_grad():
        own, original = _bake(tiny, model, adapter, tmp_path)
        held = Component("transformer", "model.diffusion_model.", ORIGINAL)
        for key, tensor in stored_state(tiny.family, held, own).items():
            torch.testing.assert_close(original[key], tensor, **CLOSE, msg=key)
        before = model(**_inputs(kind)).sample
        model.load_lora_adapter(dict(adapter), prefix="transformer", adapter_name="a")
        model.set_adapters(["a"], [0.7])
        live = model(**_inputs(kind)).sample
        baked = tiny.make()
        baked.load_state_dict(own, strict=False)
        torch.testing.assert_close(baked(**_inputs(kind)).sample, live, rtol=1e-3, atol=1e-3)
        assert (live - before).abs().max() > 0.1


def test_a_baked_original_is_what_diffusers_converter_takes_it_for(tmp_path: Path) -> None:
    """SD3's converter alone takes a model of any width."""
    tiny = tiny_sd3()
    model, adapter = tiny.make(), _adapter(tiny, packed=True)
    with registered(tiny.family), torch.no_grad():
        own, original = _bake(tiny, model, adapter, tmp_path)
    original["pos_embed"] = model.pos_embed.pos_embed
    converted = convert_sd3_transformer_checkpoint_to_diffusers(original)
    for key, tensor in own.items():
        torch.testing.assert_close(converted[key], tensor, **CLOSE, msg=key)


@pytest.mark.parametrize("kind", TINY)
def test_packed_factors_change_the_same_rows_in_either_layout(kind: str, tmp_path: Path) -> None:
    """Bake what kohya packs into the original and convert, or convert and bake: one result."""
    tiny = TINY[kind]()
    model, adapter = tiny.make(), _adapter(tiny, packed=True)
    with registered(tiny.family), torch.no_grad():
        own, original = _bake(tiny, model, adapter, tmp_path)
        held = Component("transformer", "model.diffusion_model.", ORIGINAL)
        before = stored_state(tiny.family, held, tiny.state(model))
        after = stored_state(tiny.family, held, own)
    for key, tensor in original.items():
        torch.testing.assert_close(after[key], tensor, **CLOSE, msg=key)
        stem = (
            f"lora_unet_{key.removeprefix(held.prefix).removesuffix('.weight').replace('.', '_')}"
        )
        delta = torch.zeros_like(tensor)
        if f"{stem}.lora_up.weight" in adapter and key.endswith(".weight"):
            up = adapter[f"{stem}.lora_up.weight"].flatten(1)
            down = adapter[f"{stem}.lora_down.weight"].flatten(1)
            delta = (0.7 * 2 / RANK * up @ down).reshape(tensor.shape)
        torch.testing.assert_close(tensor, before[key] + delta, **CLOSE, msg=key)
