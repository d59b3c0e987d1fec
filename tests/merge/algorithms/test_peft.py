"""The same factors in peft give the same change (formats it trains itself; float32)."""

from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from merge.algorithms import read_change


class Tiny(nn.Module):
    """One layer of every kind an adapter of peft can be on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 8)
        self.square = nn.Linear(9, 9)
        self.conv1 = nn.Conv2d(6, 8, 1)
        self.conv3 = nn.Conv2d(6, 8, 3)
        self.table = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(12)
        nn.init.normal_(self.norm.bias)
        self.experts = nn.Parameter(torch.randn(3, 5, 4))  # (n, out, in), peft's usual order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


LAYERS = ["linear", "square", "conv1", "conv3"]


def _layer(config: peft.PeftConfig, name: str) -> Any:
    """The adapted layer, with every number of its adapter random."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Tiny(), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "default" in key and "ranknum" not in key:
                parameter.normal_()
    return model.base_model.model.get_submodule(name) if name else model.base_model.model


def _compare(
    layer: Any, layout: str, tensors: Mapping[str, Any], facts: Mapping[str, Any]
) -> torch.Tensor:
    held = {role: tensor.detach() for role, tensor in tensors.items()}
    shape = tuple(layer.get_base_layer().weight.shape)
    ours = read_change(layout, held, shape, facts).weight(0, shape[0], None).reshape(shape)
    theirs = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    return ours


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora(name: str, use_rslora: bool) -> None:
    config = peft.LoraConfig(r=5, lora_alpha=3, target_modules=LAYERS, use_rslora=use_rslora)
    layer = _layer(config, name)
    tensors = {"down": layer.lora_A.default.weight, "up": layer.lora_B.default.weight}
    facts = {"scale": 3 / 5**0.5 if use_rslora else 3 / 5}
    assert _compare(layer, "lora", tensors, facts).abs().max() > 0.1


def test_a_transposed_weight_takes_the_transposed_change() -> None:
    """GPT-2's Conv1D holds (in, out); our change is of (out, in), and the base's place turns it."""
    model = nn.ModuleDict({"c": Conv1D(8, 12)})
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=3, target_modules=["c"], fan_in_fan_out=True)
    )
    layer = adapted.base_model.model["c"]
    nn.init.normal_(layer.lora_B.default.weight)
    tensors = {
        "down": layer.lora_A.default.weight.detach(),
        "up": layer.lora_B.default.weight.detach(),
    }
    facts = {"scale": 1.0, "fan_in_fan_out": True}
    ours = read_change("lora", tensors, (8, 12), facts).weight(0, 8, None)
    torch.testing.assert_close(ours.mT, layer.get_delta_weight("default").detach())


def test_lora_bias() -> None:
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["linear"], lora_bias=True)
    layer = _layer(config, "linear")
    tensors = {
        "down": layer.lora_A.default.weight,
        "up": layer.lora_B.default.weight,
        "up_bias": layer.lora_B.default.bias,
    }
    change = read_change(
        "lora", {r: t.detach() for r, t in tensors.items()}, (8, 12), {"scale": 1.5}
    )
    before = layer.get_base_layer().bias.detach().clone()
    layer.merge()
    found = change.bias(before, None)
    assert found is not None
    torch.testing.assert_close(before + found, layer.get_base_layer().bias.detach())


def test_embedding() -> None:
    layer = _layer(peft.LoraConfig(r=3, lora_alpha=2, target_modules=["table"]), "table")
    tensors = {
        "embedding_down": layer.lora_embedding_A.default,
        "embedding_up": layer.lora_embedding_B.default,
    }
    _compare(layer, "lora-embedding", tensors, {"scale": 2 / 3})


@pytest.mark.parametrize("is_transposed", [False, True])
def test_packed_experts(is_transposed: bool) -> None:
    model = Tiny()
    model.is_transposed = is_transposed
    config = peft.LoraConfig(r=2, lora_alpha=3, target_parameters=["experts"], target_modules=[])
    torch.manual_seed(0)
    adapted = peft.get_peft_model(nn.ModuleDict({"moe": model}), config)
    layer = adapted.base_model.model["moe"]
    with torch.no_grad():
        layer.lora_B.default.weight.normal_()
    tensors = {
        "down": layer.lora_A.default.weight.detach(),
        "up": layer.lora_B.default.weight.detach(),
    }
    theirs = layer.get_delta_weight("default").detach()
    for facts in ({}, {"experts_transposed": is_transposed}):
        change = read_change("lora-experts", tensors, (3, 5, 4), {"scale": 1.5, **facts})
        torch.testing.assert_close(change.weight(0, 3, None).reshape(3, 5, 4), theirs)


@pytest.mark.parametrize("name", ["linear", "square", "conv3"])
def test_adalora(name: str) -> None:
    config = peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=4, target_modules=LAYERS, total_step=10
    )
    layer = _layer(config, name)
    tensors = {
        "down": layer.lora_A.default,
        "up": layer.lora_B.default,
        "lora_E": layer.lora_E.default,
    }
    _compare(layer, "adalora", tensors, {"scale": 4 / (6 + 1e-5)})


@pytest.mark.parametrize("name", ["linear", "square"])
def test_vera(name: str) -> None:
    config = peft.VeraConfig(r=4, target_modules=["linear", "square"])
    layer = _layer(config, name)
    tensors = {
        "vera_lambda_b": layer.vera_lambda_b.default,
        "vera_lambda_d": layer.vera_lambda_d.default,
        "vera_A": layer.vera_A["default"],
        "vera_B": layer.vera_B["default"],
    }
    _compare(layer, "vera", tensors, {})


def _held(layer: Any, prefix: str) -> dict[str, torch.Tensor]:
    return {
        key.split(".")[0]: parameter
        for key, parameter in layer.named_parameters()
        if key.startswith(prefix)
    }


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("is_tucker", [False, True])
def test_loha(name: str, is_tucker: bool) -> None:
    config = peft.LoHaConfig(r=3, alpha=2, target_modules=LAYERS, use_effective_conv2d=is_tucker)
    layer = _layer(config, name)
    tensors = _held(layer, "hada_")
    assert ("hada_t1" in tensors) == (is_tucker and name == "conv3")
    _compare(layer, "loha", tensors, {"scale": 2 / 3})


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        {"r": 1, "decompose_both": True},
        {"r": 1},
        {"r": 1, "use_effective_conv2d": True},
        {"r": 16},  # both sides whole: peft still scales them by alpha / r
    ],
    ids=["both", "one", "tucker", "none"],
)
def test_lokr(name: str, options: dict[str, Any]) -> None:
    layer = _layer(peft.LoKrConfig(alpha=2, target_modules=LAYERS, **options), name)
    tensors = _held(layer, "lokr_")
    assert ("lokr_t2" in tensors) == ("use_effective_conv2d" in options and name == "conv3")
    if name == "linear":
        assert ("lokr_w1" in tensors) == ("decompose_both" not in options)
    assert ("lokr_w2" in tensors) == (options["r"] == 16)
    _compare(layer, "lokr", tensors, {"scale": 2 / options["r"]})


# peft asks a norm layer for the features that it does not need.
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_tuned_norms() -> None:
    layer = _layer(peft.LNTuningConfig(target_modules=["norm"]), "norm")
    tuned = layer.ln_tuning_layers.default
    tensors = {
        "weight": tuned.weight.detach(),
        "bias": tuned.bias.detach(),
    }
    old = layer.get_base_layer()
    weight, bias = old.weight.detach().clone(), old.bias.detach().clone()
    change = read_change("replacement", tensors, (12,), {})
    changed = change.bias(bias, weight[:, None])
    assert changed is not None
    layer.merge()
    new = layer.get_base_layer()
    torch.testing.assert_close(weight + change.weight(0, 12, weight[:, None])[:, 0], new.weight)
    torch.testing.assert_close(bias + changed, new.bias)


def test_trained_tokens() -> None:
    ids = [7, 2, 9]
    config = peft.TrainableTokensConfig(target_modules=["table"], token_indices=ids)
    layer = _layer(config, "table")
    rows = layer.trainable_tokens_delta.default.detach()
    table = layer.get_base_layer().weight.detach().clone()
    change = read_change("tokens", {"trainable_tokens_delta": rows}, (11, 6), {"token_ids": ids})
    layer.merge()
    merged = layer.get_base_layer().weight.detach()
    torch.testing.assert_close(table + change.weight(0, 11, table), merged)
