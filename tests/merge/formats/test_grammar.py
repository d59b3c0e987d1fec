"""The grammar and merge.algorithms speak of the same layouts, roles, ranks and needs."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merge import algorithms
from merge.algorithms import dora, read_change
from merge.formats.adapters import Entry, read_layout
from merge.formats.configs import READ_TYPES
from merge.formats.grammar import ALGORITHMS, LAYOUTS, SAME, algorithm_of
from merge.formats.header import read_header
from merge.formats.shapes import measure
from merge.formats.suffixes import SUFFIXES, split_key
from tests.merge.algorithms import cases, cases_on_base

OF_ROLES = {suffix.role: text for text, suffix in reversed(list(SUFFIXES.items()))} | {
    f"oft_blocks.{n}": f".oft_blocks.{n}" for n in range(4)
}


def test_both_tables_have_the_same_layouts() -> None:
    assert set(algorithms.LAYOUTS) == LAYOUTS


@pytest.mark.parametrize(
    "row", [row for row in ALGORITHMS if row.layout], ids=lambda row: "+".join(sorted(row.required))
)
def test_every_role_of_a_row_is_read(row: Any) -> None:
    _, roles = algorithms.LAYOUTS[row.layout]
    as_read = {
        SAME.get(role, role) if row.layout == "replacement" else role for role in row.allowed
    }
    assert as_read - {dora.ROLE} <= set(roles.split())


@pytest.mark.parametrize("text", SUFFIXES)
def test_every_suffix_is_taken_off_and_has_a_row(text: str) -> None:
    split = split_key(f"model.layers.0.x{text}")
    assert split is not None
    assert (split.stem, split.role) == ("model.layers.0.x", SUFFIXES[text].role)
    assert any(split.role in row.allowed for row in ALGORITHMS)


def _all_cases() -> list[Any]:
    makers = [
        value
        for module in (cases, cases_on_base)
        for name, value in vars(module).items()
        if name.endswith("_cases") and not name.startswith("_")
    ]
    return list(chain.from_iterable(maker() for maker in makers))


CASES = {case.name: case for case in _all_cases()}


STEM = "language.blocks.0.mlp.up"


@pytest.mark.parametrize("name", CASES)
def test_every_layout_is_named_and_measured_as_it_is_read(name: str, tmp_path: Path) -> None:
    """The roles and shapes of a case give its layout, rank and needs, without its values."""
    case = CASES[name]
    shapes = {role: tuple(tensor.shape) for role, tensor in case.tensors.items()}
    match = algorithm_of(frozenset(shapes))
    assert match.is_whole
    shape = tuple(case.shape) if hasattr(case, "shape") else tuple(case.weight.shape)
    dims = measure(case.layout, shapes)
    if case.layout != "lora-experts":
        assert dims.fits(shape)
        assert not dims.is_shown or not dims.fits(tuple(n + 1 for n in shape))
    change = read_change(case.layout, case.tensors, shape, case.facts)
    if hasattr(case, "rank") and case.layout != "lora-experts":
        factors = change.factors()
        assert (None if factors is None else factors.rank) == dims.exact_rank


def _entry_of(case: Any, folder: Path) -> Entry:
    tensors = {
        STEM + OF_ROLES[role]: tensor.contiguous().clone() for role, tensor in case.tensors.items()
    }
    save_file(tensors, folder / "adapter.safetensors")
    config: dict[str, Any] = {"lora_parameters": {}, "token_indices": [0], **case.facts}
    layout = read_layout(read_header(folder / "adapter.safetensors"), name="adapter", config=config)
    (entry,) = layout.entries
    return entry


@pytest.mark.parametrize(
    "name",
    # kohya's OFT shows itself by its prefix, and torchtune's files hold no alpha.
    [n for n, c in CASES.items() if c.layout != "oft-kohya" and n != "torchtune alpha"],
)
def test_every_layout_is_an_entry_of_a_file(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    entry = _entry_of(case, tmp_path)
    needs_more = case.layout in ("lora-experts", "lora-mha")  # said by a configuration or siblings
    assert entry.layout == ("lora" if needs_more else case.layout)
    assert entry.name.endswith(STEM)
    assert set(entry.keys) == set(case.tensors)
    shape = tuple(case.shape) if hasattr(case, "shape") else tuple(case.weight.shape)
    change = read_change(case.layout, case.tensors, shape, {**entry.facts, **case.facts})
    if "dora_axis" not in case.facts:
        assert entry.needs == change.needs
    if case.layout == "ia3-peft" and len(shape) > 2:
        return  # a convolution's vector does not say which side it scales
    bias = torch.zeros(shape[0], dtype=torch.float64)
    base = torch.zeros(shape[0], int(torch.tensor(shape[1:]).prod()), dtype=torch.float64)
    assert entry.touches_bias == (change.bias(bias, base) is not None)


def test_every_type_of_configuration_names_layouts_that_exist() -> None:
    assert {layout for layouts in READ_TYPES.values() for layout in layouts} <= LAYOUTS
    json.dumps(READ_TYPES)
