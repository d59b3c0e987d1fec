"""Tiny diffusers models: what they answer with a live adapter, and baked, in their own and in the
original layout.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.families import Family
from merge.families.checkpoints import Component
from merge.families.layers import ORIGINAL
from tests.fixtures.engine import run
from tests.fixtures.families import (
    make_models,
    registered,
    stored_state,
    tiny_family,
    tiny_flux,
    tiny_lumina2,
    tiny_sd3,
)

State = dict[str, torch.Tensor]
pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries say about tiny models


def _random(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _unet(name: str) -> tuple[Family, Any]:
    return tiny_family(name), make_models(name)["unet"].eval()


def _ask_sd15(model: Any) -> torch.Tensor:
    return model(_random(1, 4, 16, 16), 7, encoder_hidden_states=_random(1, 5, 32)).sample


def _ask_sdxl(model: Any) -> torch.Tensor:
    added = {"text_embeds": _random(1, 32), "time_ids": torch.ones(1, 6)}
    text = _random(1, 5, 32)
    answer = model(_random(1, 4, 16, 16), 7, encoder_hidden_states=text, added_cond_kwargs=added)
    return answer.sample


def _ask_flux(model: Any) -> torch.Tensor:
    return model(
        hidden_states=_random(1, 6, 16),
        encoder_hidden_states=_random(1, 4, 32),
        pooled_projections=_random(1, 16),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.5]),
        img_ids=torch.zeros(6, 3),
        txt_ids=torch.zeros(4, 3),
    ).sample


def _ask_sd3(model: Any) -> torch.Tensor:
    return model(
        hidden_states=_random(1, 4, 8, 8),
        encoder_hidden_states=_random(1, 5, 24),
        pooled_projections=_random(1, 16),
        timestep=torch.tensor([500]),
    ).sample


def _ask_lumina2(model: Any) -> torch.Tensor:
    return model(
        hidden_states=_random(1, 4, 8, 8),
        timestep=torch.tensor([0.5]),
        encoder_hidden_states=_random(1, 5, 24),
        encoder_attention_mask=torch.ones(1, 5, dtype=torch.bool),
    ).sample


def _tiny(make: Callable[[], Any]) -> tuple[Family, Any]:
    tiny = make()
    return tiny.family, tiny.make()


MODELS: dict[str, tuple[Callable[[], tuple[Family, Any]], Callable[[Any], torch.Tensor]]] = {
    "sd15": (lambda: _unet("sd15-tiny"), _ask_sd15),
    "sdxl": (lambda: _unet("sdxl-tiny"), _ask_sdxl),
    "flux": (lambda: _tiny(tiny_flux), _ask_flux),
    "sd3": (lambda: _tiny(tiny_sd3), _ask_sd3),
    "lumina2": (lambda: _tiny(tiny_lumina2), _ask_lumina2),
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_mlp", "proj_out", "add_k_proj"]


@pytest.fixture(params=list(MODELS))
def made(request: pytest.FixtureRequest) -> Iterator[tuple[Family, Any, Any]]:
    make, ask = MODELS[request.param]
    family, model = make()
    with registered(family):
        yield family, model, ask


def _parameters(family: Family, model: Any) -> State:
    """By our own keys; buffers are none of a checkpoint's business here."""
    return {key: parameter.detach().clone() for key, parameter in model.named_parameters()}


def _adapt(model: Any, folder: Path) -> Path:
    """A random LoRA as diffusers makes and saves one, left at work in the model."""
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_lora_adapter(folder / "adapter")
    (file,) = (folder / "adapter").glob("*.safetensors")
    return file


def test_a_baked_denoiser_answers_as_the_live_one(
    made: tuple[Family, Any, Any], tmp_path: Path
) -> None:
    family, model, ask = made
    own = _parameters(family, model)
    save_file(own, tmp_path / "own.safetensors")
    with torch.no_grad():
        before = ask(model)
        adapter = _adapt(model, tmp_path)
        live = ask(model)
        model.unload_lora()
    run(tmp_path / "out.safetensors", [(adapter, 1.0)], base=tmp_path / "own.safetensors")
    baked = load_file(tmp_path / "out.safetensors")
    assert baked.keys() == own.keys()
    model.load_state_dict(baked, strict=False)
    with torch.no_grad():
        after = ask(model)
    scale = float(live.abs().max())
    torch.testing.assert_close(after, live, rtol=0, atol=2e-5 * scale)
    assert (live - before).abs().max() > 1e-2 * scale


def test_the_original_layout_becomes_the_same_model(
    made: tuple[Family, Any, Any], tmp_path: Path
) -> None:
    """Bare, and behind the prefixes that all-in-one files and ComfyUI have."""
    family, model, _ = made
    own = _parameters(family, model)
    save_file(own, tmp_path / "own.safetensors")
    adapter = _adapt(model, tmp_path)
    baked = tmp_path / "baked.safetensors"
    run(baked, [(adapter, 0.7)], base=tmp_path / "own.safetensors", numerics="reproducible")
    for number, (prefix, naming) in enumerate(family.single_file[family.denoiser]):
        if naming != ORIGINAL:
            continue
        held = Component(family.denoiser, prefix, naming)
        base, out = tmp_path / f"{number}.safetensors", tmp_path / f"{number}-out.safetensors"
        save_file(_contiguous(stored_state(family, held, own)), base)
        run(out, [(adapter, 0.7)], base=base, numerics="reproducible")
        after, wanted = load_file(out), stored_state(family, held, load_file(baked))
        assert after.keys() == wanted.keys()
        assert all(torch.equal(after[key], wanted[key]) for key in wanted)
    assert any(naming == ORIGINAL for _, naming in family.single_file[family.denoiser])


def _contiguous(state: State) -> State:
    return {key: tensor.contiguous() for key, tensor in state.items()}
