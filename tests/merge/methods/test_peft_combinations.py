"""PEFT 0.21.2's own combinations of adapters on dense changes, and where they are not what they say."""

from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from merge.method_parameters import Magnitude, Ties
from merge.methods.elements import Dense
from merge.methods.rules import ELEMENTS
from tests.merge.methods.changes import draws, whole

OUT, IN, DENSITY = 24, 20, 0.4  # of 480 elements exactly 192 are kept


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(IN, OUT, bias=False)


def _adapted() -> Any:
    """A layer with two adapters of random factors, alpha / rank = 2."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["linear"])
    model = peft.get_peft_model(Layer(), config, adapter_name="one")
    model.add_adapter("other", config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_()
    return model


def _combined(model: Any, kind: str, weights: list[float]) -> np.ndarray:
    model.add_weighted_adapter(
        ["one", "other"], weights, "both", combination_type=kind, svd_rank=IN, density=DENSITY
    )
    return _delta(model, "both")


def _delta(model: Any, name: str) -> np.ndarray:
    delta: torch.Tensor = model.base_model.model.linear.get_delta_weight(name).detach()
    return delta.double().numpy()


def _ours(model: Any, parameters: Any, strengths: list[float]) -> np.ndarray:
    changes = [
        Dense(torch.from_numpy(strength * _delta(model, name)))
        for name, strength in zip(["one", "other"], strengths, strict=True)
    ]
    return whole(ELEMENTS[parameters.name](changes, parameters, draws(2)))


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("ties_svd", Ties(name="ties", density=DENSITY)),
        ("magnitude_prune_svd", Magnitude(name="magnitude", density=DENSITY)),
    ],
)
def test_dense_combinations_are_ours_where_adapters_weigh_the_same(
    kind: str, parameters: Any, weight: float
) -> None:
    model = _adapted()
    theirs = _combined(model, kind, [weight, weight])
    ours = _ours(model, parameters, [weight, weight])
    np.testing.assert_allclose(theirs, ours, atol=2e-5 * np.abs(ours).max())


def test_changes_vote_at_their_strengths_and_in_peft_without() -> None:
    model, parameters = _adapted(), Ties(name="ties", density=DENSITY)
    theirs = _combined(model, "ties_svd", [1.0, 0.1])
    ours = _ours(model, parameters, [1.0, 0.1])
    differ = np.abs(theirs - ours) > 1e-3 * np.abs(ours).max()
    assert differ.any()
    # Only where the signs differ, and there the stronger adapter's is ours.
    one = _ours(model, Magnitude(name="magnitude", density=DENSITY), [1.0, 0.0])
    assert (np.sign(ours[differ]) == np.sign(one[differ])).all()
    assert (np.sign(theirs[differ]) != np.sign(one[differ])).all()


def test_opposite_adapters_do_not_cancel_in_peft() -> None:
    model, parameters = _adapted(), Ties(name="ties", density=DENSITY)
    for part in ("lora_A", "lora_B"):
        factors = getattr(model.base_model.model.linear, part)
        sign = -1 if part == "lora_B" else 1
        factors["other"].weight.data.copy_(sign * factors["one"].weight.data)
    theirs = _combined(model, "ties_svd", [1.0, 1.0])
    assert np.linalg.norm(theirs) > 0.5 * np.linalg.norm(_delta(model, "one"))
    assert not _ours(model, parameters, [1.0, 1.0]).any()


def test_ties_of_factors_is_not_ties_of_changes() -> None:
    """peft's `ties` treats A and B apart: their product has terms that no adapter has."""
    model, parameters = _adapted(), Ties(name="ties", density=DENSITY)
    theirs = _combined(model, "ties", [1.0, 1.0])
    ours = _ours(model, parameters, [1.0, 1.0])
    assert np.linalg.norm(theirs - ours) > 0.8 * np.linalg.norm(ours)
