"""What factors that depend on the base are refused for: one sentence each."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from merge.algorithms import read_change

ones, zeros = torch.ones, torch.zeros
LORA = {"down": ones(2, 8), "up": ones(6, 2)}
GLORA = {"a1": ones(8, 2), "a2": ones(2, 8), "b1": ones(6, 2), "b2": ones(2, 8)}
PAPER = {"glora_A.Xd": ones(6, 2), "glora_A.Xu": ones(2, 8)}
FORK = {"glora_Ad": ones(6, 2), "glora_Au": ones(2, 8)}
CHOICES = {"A": "LoRA_2", "B": "none", "C": "none", "D": "none", "E": "none"}


@pytest.mark.parametrize(
    ("layout", "tensors", "message"),
    [
        ("lora", {**LORA, "dora_scale": ones(5, 1)}, r"magnitudes are \(5, 1\), which fit no axis"),
        ("lora", {**LORA, "dora_scale": ones(8, 1)}, r"magnitudes are \(8, 1\), which fit no axis"),
        ("glora", {**GLORA, "a1": ones(8, 3)}, "which have no rank in common"),
        ("glora", {**GLORA, "a1": ones(8)}, "of which some are no matrices"),
        ("glora", {**GLORA, "a1": ones(7, 2), "a2": ones(2, 7)}, r"A is \(7, 7\), base weight is"),
        ("glora", {**GLORA, "b1": ones(5, 2)}, r"delta is \(5, 8\), base weight is \(6, 8\)"),
        ("glora", {**GLORA, "bm": ones(3, 3, 1, 1)}, r"the Tucker core is \(3, 3, 1, 1\)"),
        ("glora-paper", {**PAPER, "glora_A.Xu": ones(3, 8)}, r"factors of A are \(6, 2\) and"),
        ("glora-paper", {**PAPER, "glora_A.Xu": ones(2, 7)}, r"delta is \(6, 7\), base weight is"),
        ("glora-paper", {"glora_A.Xd": ones(6, 2)}, "A has one of its two factors"),
        ("glora-paper", {**PAPER, "glora_A.X": ones(6, 1)}, "glora_A.X belong to no path"),
        ("glora-paper", {**PAPER, "glora_E.X": ones(5)}, r"E is \(5,\), the weight has 6 rows"),
        ("glora-paper", {**PAPER, "glora_C.X": ones(6, 1)}, "C is .* the weight has 8 input"),
        ("glora-paper", FORK, "which part of it counts is in its eval_config"),
        ("oft", {"oft_blocks": ones(3, 3, 3)}, r"the blocks turn 9 rows, base weight is \(6, 8\)"),
        ("oft", {"oft_blocks": ones(3, 2, 1)}, r"blocks are \(3, 2, 1\), which are no square"),
        ("oft", {"oft_blocks": ones(3, 2, 2), "rescale": ones(5)}, r"rescale is \(5,\), base"),
        ("oft", {"oft_blocks": ones(3, 2, 2), "alpha": ones(2)}, r"alpha is \(2,\), which is not"),
        ("oft-kohya", {"oft_blocks": ones(3, 2, 2)}, "OFT without alpha"),
        ("oft-legacy", {"oft_diag": ones(2, 2, 2)}, "the blocks turn 4 rows"),
        ("oft-peft", {"oft_R": ones(3, 3)}, r"3 blocks of 3 columns do not make the 8"),
        ("oft-peft", {"oft_R": ones(4, 2)}, "2 entries are no upper triangle"),
        ("oft-peft", {"oft_R": ones(4)}, r"oft_R is \(4,\), not one row for each block"),
        ("boft", {"oft_blocks": ones(1, 2, 4, 4)}, "2 blocks of 4 do not make the 6"),
        ("boft", {"oft_blocks": ones(2, 3, 2, 2)}, "2 stages of 3 blocks of 2 make no butterfly"),
        ("boft", {"oft_blocks": ones(3, 2, 2)}, r"blocks are \(3, 2, 2\), not stages"),
        (
            "boft-peft",
            {"boft_R": ones(1, 2, 4, 4), "boft_s": ones(5, 1)},
            r"boft_s is \(5, 1\), base",
        ),
        ("ia3", {"weight": ones(8), "on_input": zeros(())}, r"weight is \(8,\), base weight is"),
        ("ia3", {"weight": ones(8), "on_input": zeros(2)}, "on_input is .* not one number"),
        ("ia3-peft", {"ia3_l": ones(8, 1)}, r"ia3_l is \(8, 1\), base weight is \(6, 8\)"),
        ("hra", {"hra_u": ones(6, 2)}, r"hra_u is \(6, 2\), base weight is \(6, 8\)"),
        ("hra", {"hra_u": zeros(8, 2)}, "column 0 of hra_u has no direction"),
        ("hira", {"hira_A": ones(2, 8), "hira_B": ones(6, 3)}, "up has rank 3 and down has rank 2"),
        ("hira", {"hira_A": ones(2, 7), "hira_B": ones(6, 2)}, r"delta is \(6, 7\), base weight"),
        ("hra", {"hra_u": ones(8, 2), "alpha": ones(1)}, "hra factors with alpha, which it does"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    layout: str, tensors: Mapping[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_change(layout, tensors, (6, 8), {})


@pytest.mark.parametrize(
    ("layout", "tensors", "facts", "message"),
    [
        ("lora", {**LORA, "dora_scale": ones(6, 1)}, {"dora_axis": "input"}, "fit no axis"),
        ("lora", {**LORA, "dora_scale": ones(6, 1)}, {"dora_axis": "rows"}, "not a valid Axis"),
        (
            "glora-paper",
            FORK,
            {"eval_config": {**CHOICES, "A": "FourierFT"}},
            "chooses 'FourierFT'",
        ),
        (
            "glora-paper",
            FORK,
            {"eval_config": {**CHOICES, "B": "LoRA_2"}},
            "chooses 'LoRA_2' for B, which is not in the file",
        ),
        ("hra", {"hra_u": ones(8, 2)}, {"is_gram_schmidt": True}, "column 1 of hra_u has no"),
    ],
)
def test_what_the_configuration_says_must_fit_too(
    layout: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_change(layout, tensors, (6, 8), facts)


def test_ia3_of_a_square_convolution_needs_its_configuration() -> None:
    tensors = {"ia3_l": ones(1, 6, 1, 1)}
    with pytest.raises(ValueError, match="is in feedforward_modules of adapter_config.json"):
        read_change("ia3-peft", tensors, (6, 6, 3, 3), {})
