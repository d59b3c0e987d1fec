"""The same factors merged by peft 0.21.2 and LyCORIS 4.1.3, for algorithms that depend on the base.

Both are right at strength 1, and LyCORIS' rotations at any strength of its own kind. The files of
PEFT are what its save_pretrained writes; what it merges is compared as whole tensors.
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lycoris.modules
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from merge.algorithms import glora, hra, lora, read_change
from merge.algorithms.change import Change, Needs
from tests.merge.algorithms.cases import Maker

# What PEFT calls a tensor, and which layout and role it is for us.
ROLES = {
    **{f"glora_{letter}.{part}": "" for letter in "ABCDE" for part in ("Xd", "Xu", "X", "zeros")},
    **{role: "" for role in ("boft_R", "boft_s", "ia3_l", "hra_u", "hira_A", "hira_B")},
    **{role: "" for role in ("hira_embedding_A", "hira_embedding_B")},
    "oft_R.weight": "oft_R",
    "oft_embedding_R.weight": "oft_embedding_R",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_embedding_A": "embedding_down",
    "lora_embedding_B": "embedding_up",
    "lora_magnitude_vector": "dora_scale",
}


class Model(nn.Module):
    """Layers whose widths hold whole blocks of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)
        self.square = nn.Linear(8, 8)
        self.bare = nn.Linear(8, 6, bias=False)
        self.conv = nn.Conv2d(4, 8, 3)
        self.small = nn.Conv2d(8, 8, 1)
        self.table = nn.Embedding(10, 8)


LINEAR = ["linear", "square", "bare"]
CONV = ["conv", "small"]
PEFT: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "dora": ("lora", lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True,
        target_modules=[*LINEAR, *CONV, "table"]), {"scale": 5 / 3, "dora_axis": {"table": "input", "small": "output"}}),
    "oft": ("oft-peft", lambda: peft.OFTConfig(oft_block_size=4,
        target_modules=[*LINEAR, *CONV, "table"]), {}),
    "oft exact": ("oft-peft", lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False,
        target_modules=[*LINEAR, *CONV]), {"use_cayley_neumann": False}),
    "oft 3 terms": ("oft-peft", lambda: peft.OFTConfig(oft_block_size=4,
        num_cayley_neumann_terms=3, target_modules=LINEAR), {"num_cayley_neumann_terms": 3}),
    "oft 7 terms": ("oft-peft", lambda: peft.OFTConfig(oft_block_size=2,
        num_cayley_neumann_terms=7, target_modules=LINEAR), {"num_cayley_neumann_terms": 7}),
    "oft shared": ("oft-peft", lambda: peft.OFTConfig(oft_block_size=4, block_share=True,
        target_modules=[*LINEAR, *CONV]), {"block_share": True}),
    "oft constrained": ("oft-peft", lambda: peft.OFTConfig(oft_block_size=4, coft=True, eps=0.3,
        target_modules=LINEAR), {"coft_eps": 0.3}),
    "boft": ("boft-peft", lambda: peft.BOFTConfig(boft_block_size=4,
        target_modules=[*LINEAR, *CONV]), {}),
    "boft butterfly": ("boft-peft", lambda: peft.BOFTConfig(boft_block_size=2,
        boft_n_butterfly_factor=2, target_modules=[*LINEAR, *CONV]), {}),
    "boft deep": ("boft-peft", lambda: peft.BOFTConfig(boft_block_size=2,
        boft_n_butterfly_factor=3, target_modules=LINEAR), {}),
    "ia3": ("ia3-peft", lambda: peft.IA3Config(target_modules=[*LINEAR, *CONV],
        feedforward_modules=["square", "conv"]),
        {"is_feedforward": {"square": True, "conv": True, "small": False}}),
    "hra": ("hra", lambda: peft.HRAConfig(r=4, target_modules=[*LINEAR, *CONV]), {}),
    "hra orthonormal": ("hra", lambda: peft.HRAConfig(r=4, apply_GS=True,
        target_modules=[*LINEAR, *CONV]), {"is_gram_schmidt": True}),
    "hira": ("hira", lambda: peft.HiraConfig(r=3, target_modules=[*LINEAR, *CONV, "table"]), {}),
    "glora": ("glora-paper", lambda: peft.GloraConfig(r=3, target_modules=LINEAR,
        config_D_E="vector"), {}),
    "glora vectors": ("glora-paper", lambda: peft.GloraConfig(r=3, target_modules=LINEAR,
        config_A_B="vector", config_C="vector"), {}),
    "glora numbers": ("glora-paper", lambda: peft.GloraConfig(r=3, target_modules=LINEAR,
        config_A_B="constant", config_C="none", config_D_E="none"), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", PEFT)
def test_merging_is_what_peft_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _blocks_without_cuda(monkeypatch)
    layout, config, facts = PEFT[name]
    base = {key: tensor.double() for key, tensor in Model().state_dict().items()}
    model = Model().double()
    model.load_state_dict(base)
    tuned = peft.get_peft_model(model, config())
    tuned.double()
    make = Maker(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * make(*parameter.shape)
    tuned.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    merged = tuned.merge_and_unload().state_dict()
    layers = _by_layer(stored)
    assert len(layers) >= 3
    for layer, tensors in layers.items():
        said = {k: v[layer] if isinstance(v, dict) else v for k, v in facts.items()
                if not isinstance(v, dict) or layer in v}  # fmt: skip
        here = "lora-embedding" if "embedding_down" in tensors else layout
        weight, bias = base[f"{layer}.weight"], base.get(f"{layer}.bias")
        change = read_change(here, tensors, tuple(weight.shape), said)
        expected = merged[f"{layer}.weight"]
        assert not torch.allclose(expected, weight)
        # PEFT divides the limit of a constrained OFT in float32.
        torch.testing.assert_close(_changed(change, weight), expected, rtol=1e-7, atol=1e-8)
        if bias is not None:
            added = change.bias(bias, weight.flatten(1))
            changed = bias if added is None else bias + added
            torch.testing.assert_close(changed, merged[f"{layer}.bias"], rtol=1e-9, atol=1e-9)


def _blocks_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT lays out BOFT's blocks in a CUDA kernel, and has one stage without it."""

    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*stage) for stage in blocks])]

    monkeypatch.setattr(peft.tuners.boft.layer, "_FBD_CUDA", SimpleNamespace(forward=forward))


def _by_layer(stored: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in stored.items():
        layer, suffix = key.removeprefix("base_model.model.").split(".", 1)
        layers.setdefault(layer, {})[ROLES[suffix] or suffix] = tensor
    return layers


def _changed(change: Change, weight: torch.Tensor) -> torch.Tensor:
    base = weight.flatten(1)
    given = None if change.needs is Needs.NOTHING else base
    return (base + change.weight(0, len(base), given)).reshape(weight.shape)


def _layers() -> Iterator[tuple[str, nn.Module]]:
    for name in ("linear", "square", "conv", "small"):
        torch.manual_seed(0)
        yield name, getattr(Model().double(), name)


def _lycoris(
    layer: nn.Module,
    tensors: dict[str, torch.Tensor],
    strength: float,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """What LyCORIS makes of a file that holds these tensors for one layer.

    Its modules are float32 when they take the factors, whatever is computed with.
    """
    keys = {
        **{role: f"x.{role}.weight" for role in ("a1", "a2", "b1", "b2")},
        "down": "x.lora_down.weight",
        "up": "x.lora_up.weight",
    }
    stored = {keys.get(role, f"x.{role}"): tensor for role, tensor in tensors.items()}
    kind, params = lycoris.modules.get_module(stored, "x")
    with torch.no_grad():
        copied = deepcopy(layer).to(dtype)
        module = lycoris.modules.make_module(kind, params, "x", copied).to(dtype)
        return module.get_merged_weight(strength)[0].detach().double()


def _single(make: Maker, *shape: int) -> torch.Tensor:
    return make(*shape).float().double()


@pytest.mark.parametrize("layer", [*dict(_layers()).values()], ids=dict(_layers()))
def test_dora_and_glora_are_those_of_lycoris(layer: nn.Module) -> None:
    make, weight = Maker(3), layer.weight.detach()
    out, inner, *kernel = weight.shape
    ones = [1] * len(kernel)
    factors = {
        "down": _single(make, 3, inner, *kernel),
        "up": _single(make, out, 3, *ones),
        "alpha": torch.tensor(2.0),
        "dora_scale": _single(make, out, 1, *ones),
    }
    change = read_change("lora", factors, tuple(weight.shape), {})
    theirs = _lycoris(layer, factors, 1.0)
    torch.testing.assert_close(_changed(change, weight), theirs, rtol=1e-9, atol=1e-9)
    factors = {
        "a1": _single(make, inner, 3, *ones),
        "a2": _single(make, 3, inner, *ones),
        "b1": _single(make, out, 3, *ones),
        "b2": _single(make, 3, inner, *kernel),
        "alpha": torch.tensor(2.0),
    }
    change = read_change("glora", factors, tuple(weight.shape), {})
    for strength in (1.0, 0.5, -0.7, 0.0):
        ours = weight + strength * (_changed(change, weight) - weight)
        theirs = _lycoris(layer, factors, strength)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# The sizes LyCORIS' own rules choose: (blocks, size) of Diag-OFT, (stages, blocks, size) of BOFT.
BLOCKS = {8: ((4, 2), (2, 2, 4)), 12: ((4, 3), (2, 2, 6))}


@pytest.mark.parametrize("layer", [*dict(_layers()).values()], ids=dict(_layers()))
@pytest.mark.parametrize("alpha", [0.0, 0.2, 5.0])
@pytest.mark.parametrize("is_rescaled", [False, True])
def test_rotations_are_those_of_lycoris(layer: nn.Module, alpha: float, is_rescaled: bool) -> None:
    """LyCORIS inverts in float32 and takes no float64 here, so this is as exact as float32."""
    make, weight = Maker(4), layer.weight.detach()
    out = weight.shape[0]
    diagonal, butterfly = BLOCKS[out]
    rescale = {"rescale": make(out, *[1] * (weight.ndim - 1))} if is_rescaled else {}
    shared = {"alpha": torch.tensor(alpha), **rescale}
    blocks = {"oft_blocks": make(*diagonal, diagonal[-1]), **shared}
    change = read_change("oft", blocks, tuple(weight.shape), {})
    # Its rescale is whole at every strength, ours is part of f(W).
    for strength in (1.0,) if is_rescaled else (1.0, 0.5, -0.7, 0.0):
        ours = weight + strength * (_changed(change, weight) - weight)
        theirs = _lycoris(layer, blocks, strength, torch.float32)
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    blocks = {"oft_blocks": make(*butterfly, butterfly[-1]), **shared}
    change = read_change("boft", blocks, tuple(weight.shape), {})
    theirs = _lycoris(layer, blocks, 1.0, torch.float32)
    torch.testing.assert_close(_changed(change, weight), theirs, rtol=2e-5, atol=2e-5)


def test_half_of_a_butterfly_of_lycoris_is_another_half() -> None:
    """We go half of the way from W to f(W); LyCORIS goes half of the way in each stage of BOFT."""
    layer = dict(_layers())["square"]
    weight, tensors = layer.weight.detach(), {"oft_blocks": Maker(5)(2, 2, 4, 4)}
    change = read_change("boft", tensors, (8, 8), {})
    ours = weight + 0.5 * (_changed(change, weight) - weight)
    theirs = _lycoris(layer, {**tensors, "alpha": torch.tensor(0.0)}, 0.5, torch.float32)
    assert not torch.allclose(ours, theirs, atol=1e-2)


@pytest.mark.parametrize("shape", [(6, 8), (8, 8), (6, 4, 3, 3), (5, 4, 2)])
def test_glora_is_a_lora_of_one_base(shape: tuple[int, ...]) -> None:
    make, (out, inner, *kernel) = Maker(6), shape
    ones = [1] * len(kernel)
    factors = {
        "a1": make(inner, 3, *ones),
        "a2": make(3, inner, *ones),
        "b1": make(out, 3, *ones),
        "b2": make(3, inner, *kernel),
        "alpha": torch.tensor(2.0),
    }
    change, base = read_change("glora", factors, shape, {}), make(*shape).flatten(1)
    assert isinstance(change, glora.GLoRA)
    found = glora.to_lora_given(change, base)
    torch.testing.assert_close(
        lora.delta(found), change.weight(0, out, base), rtol=1e-12, atol=1e-12
    )
    assert found.rank == 3 * (base.shape[1] // inner + 1)


def test_reflections_are_a_lora_of_one_base() -> None:
    make = Maker(7)
    base = make(6, 8)
    change = read_change("hra", {"hra_u": make(8, 3)}, (6, 8), {})
    assert isinstance(change, hra.Reflections)
    found = hra.to_lora_given(change, base)
    assert found.rank == 3
    torch.testing.assert_close(lora.delta(found), change.weight(0, 6, base), rtol=1e-12, atol=1e-12)
