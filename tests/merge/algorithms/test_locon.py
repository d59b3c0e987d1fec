"""What LoRA factors that do not fit are refused with, and LoCon beside the tools that train it."""

import pytest
import torch
from lycoris.functional import locon as lycoris

from merge.algorithms import read_change
from tests.merge.algorithms.cases import Maker

GOOD = {"down": torch.ones(3, 4), "up": torch.ones(6, 3)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"up": torch.ones(6, 2)}, "up has rank 2 and down has rank 3"),
        ({"up": torch.ones(5, 3)}, r"delta is \(5, 4\), base weight is \(6, 4\)"),
        ({"down": torch.ones(3, 4, 3, 3)}, r"delta is \(6, 36\), base weight is \(6, 4\)"),
        ({"alpha": torch.ones(2)}, r"alpha is \(2,\), which is not one number"),
        ({"up_bias": torch.ones(5)}, "5 values for the bias of a layer with 6 outputs"),
        ({"mid": torch.ones(3, 2, 1, 1)}, r"the Tucker core is \(3, 2, 1, 1\)"),
        (
            {
                "bias_indices": torch.tensor([[0], [4]]),
                "bias_values": torch.ones(1),
                "bias_size": torch.tensor([6, 4]),
            },
            r"point outside of the \(6, 4\) matrix",
        ),
        (
            {
                "bias_indices": torch.tensor([[0], [2]]),
                "bias_values": torch.ones(2),
                "bias_size": torch.tensor([6, 4]),
            },
            r"bias_indices is \(2, 1\), for 2 values",
        ),
        (
            {
                "bias_indices": torch.tensor([[0], [2]]),
                "bias_values": torch.ones(1),
                "bias_size": torch.tensor([6, 5]),
            },
            r"the residual is \(6, 5\), base weight is \(6, 4\)",
        ),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    changed: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_change("lora", {**GOOD, **changed}, (6, 4), {})


def test_a_tucker_convolution_is_that_of_lycoris() -> None:
    make = Maker(4)
    down, mid, up = make(3, 5, 1, 1), make(3, 3, 3, 3), make(7, 3, 1, 1)
    theirs = lycoris.diff_weight(down, up, mid, gamma=0.5)
    tensors = {"down": down, "mid": mid, "up": up, "alpha": torch.tensor(1.5)}
    ours = read_change("lora", tensors, (7, 5, 3, 3), {}).weight(0, 7, None)
    torch.testing.assert_close(ours.reshape(7, 5, 3, 3), theirs, rtol=1e-12, atol=1e-12)
