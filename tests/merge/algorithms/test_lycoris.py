"""What LyCORIS' modules write changes a layer as their forward does.

Their forward, not their merge: that of LoHa and LoKr applies alpha / rank twice in 4.1.3.
"""

from typing import Any

import pytest
import torch
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from torch import nn

from merge.algorithms import read_change

LAYERS = {
    "linear": lambda: nn.Linear(12, 8),
    "square": lambda: nn.Linear(9, 9, bias=False),
    "conv1x1": lambda: nn.Conv2d(8, 12, 1),
    "conv3x3": lambda: nn.Conv2d(8, 12, 3),
}
ROLES = {f"lora_{role}.weight": role for role in ("down", "up", "mid")}


def _check(layer: nn.Module, module: Any, layout: str, roles: set[str]) -> None:
    """The module's output against that of the layer with our changes in it."""
    generator = torch.Generator().manual_seed(0)
    module.double().eval()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    written = {ROLES.get(key, key): tensor.double() for key, tensor in module.state_dict().items()}
    assert written.keys() == roles
    shape = tuple(layer.weight.shape)
    change = read_change(layout, written, shape, {})
    weight = change.weight(0, shape[0], None).reshape(shape)
    inner = shape[1] if len(shape) > 1 else shape[0]
    x = torch.randn(2, inner, *[5] * (len(shape) - 2), generator=generator, dtype=torch.float64)
    before = layer(x)
    theirs = module(x)
    with torch.no_grad():
        layer.weight += weight
        if (bias := change.bias(layer.bias, None)) is not None:
            layer.bias += bias
    assert (theirs - before).abs().max() > 0.01
    torch.testing.assert_close(layer(x), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("is_tucker", [False, True])
@pytest.mark.parametrize("rs_lora", [False, True])
def test_locon(name: str, is_tucker: bool, rs_lora: bool) -> None:
    layer = LAYERS[name]().double()
    module = LoConModule(
        "x", layer, 1.0, 3, 2.0, use_tucker=is_tucker, rs_lora=rs_lora, use_scalar=True
    )
    core = {"mid"} if is_tucker and name == "conv3x3" else set()
    _check(layer, module, "lora", {"down", "up", "alpha", *core})


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("is_tucker", [False, True])
def test_loha(name: str, is_tucker: bool) -> None:
    layer = LAYERS[name]().double()
    module = LohaModule("x", layer, 1.0, 3, 2.0, use_tucker=is_tucker)
    sides = {f"hada_w{side}_{factor}" for side in "12" for factor in "ab"}
    cores = {"hada_t1", "hada_t2"} if is_tucker and name == "conv3x3" else set()
    _check(layer, module, "loha", {"alpha", *sides, *cores})


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("options", "roles"),
    [
        ({}, "lokr_w1 lokr_w2_a lokr_w2_b"),
        ({"full_matrix": True}, "lokr_w1 lokr_w2"),  # writes alpha = rank, which means nothing
        ({"use_tucker": True}, "lokr_w1 lokr_t2 lokr_w2_a lokr_w2_b"),
        ({"unbalanced_factorization": True}, "lokr_w1 lokr_w2_a lokr_w2_b"),
    ],
    ids=["", "full", "tucker", "unbalanced"],
)
def test_lokr(name: str, options: dict[str, Any], roles: str) -> None:
    layer = LAYERS[name]().double()
    rank = 7 if "full_matrix" in options else 1
    module = LokrModule("x", layer, 1.0, rank, 0.5, **options)
    expected = set(roles.split()) - ({"lokr_t2"} if name != "conv3x3" else set())
    _check(layer, module, "lokr", {"alpha", *expected})


def test_lokr_with_both_sides_decomposed() -> None:
    layer = nn.Linear(36, 36).double()
    module = LokrModule("x", layer, 1.0, 2, 0.5, decompose_both=True)
    sides = {f"lokr_w{side}_{factor}" for side in "12" for factor in "ab"}
    _check(layer, module, "lokr", {"alpha", *sides})


def test_norms() -> None:
    layer = nn.LayerNorm(6).double()
    _check(layer, NormModule("x", layer), "norm", {"w_norm", "b_norm"})


@pytest.mark.parametrize("name", LAYERS)
def test_full(name: str) -> None:
    layer = LAYERS[name]().double()
    module = FullModule("x", layer)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    module.apply_to()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    written = module.state_dict()
    change = read_change(
        "full", {r: t.double() for r, t in written.items()}, tuple(before["weight"].shape), {}
    )
    weight = change.weight(0, len(before["weight"]), None).reshape(before["weight"].shape)
    torch.testing.assert_close(before["weight"] + weight, module.weight.data)
    if "bias" in before:
        bias = change.bias(before["bias"], None)
        assert bias is not None
        torch.testing.assert_close(before["bias"] + bias, module.bias.data)
