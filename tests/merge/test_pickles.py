"""Pickles become safetensors in a process of their own, or are refused by name."""

import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from merge import errors
from merge.identify import identify
from merge.pickles import Refused, flatten, from_pickle


def converted(tmp_path: Path, value: Any, **options: Any) -> tuple[str, Path]:
    source, out = tmp_path / "it.pt", tmp_path / "out.safetensors"
    torch.save(value, source, **options)
    return from_pickle(source, out), out


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def rows(n: int = 2, width: int = 768, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


LORA = {
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 8),
    "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(8, 2).half(),
    "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0),
}


@pytest.mark.parametrize("wrap", [dict, OrderedDict, lambda d: {"state_dict": d}])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_lora_keeps_its_keys_and_bytes(tmp_path: Path, wrap: Any, is_zip: bool) -> None:
    kind, out = converted(tmp_path, wrap(LORA), _use_new_zipfile_serialization=is_zip)
    assert kind == "adapter"
    found = load_file(out)
    assert found.keys() == LORA.keys()
    assert all(torch.equal(found[k], LORA[k]) and found[k].dtype == LORA[k].dtype for k in LORA)
    assert identify(out).kind == "adapter"


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        (
            {"string_to_token": {"*": 265}, "string_to_param": {"*": rows()}, "name": "x"},
            {"emb_params"},
        ),
        ({"<cat-toy>": rows()[0]}, {"<cat-toy>"}),
        ({"clip_l": rows(), "clip_g": rows(width=1280)}, {"clip_l", "clip_g"}),
        (rows(), {"emb_params"}),
        ([rows()], {"emb_params"}),
    ],
)
def test_textual_inversions_of_every_layout(tmp_path: Path, value: Any, keys: set[str]) -> None:
    kind, out = converted(tmp_path, value)
    assert kind == "embedding"
    found = load_file(out)
    assert set(found) == keys
    assert torch.equal(found[max(keys)].reshape(-1, 768)[0], rows()[0])
    assert identify(out).kind == "embedding"


def test_a_textual_inversion_of_the_original_code_is_read_without_its_class(tmp_path: Path) -> None:
    """Its vectors lie in a torch.nn.ParameterDict, which weights_only refuses."""
    vectors = torch.nn.ParameterDict({"*": torch.nn.Parameter(rows())})
    kind, out = converted(tmp_path, {"string_to_token": {"*": 265}, "string_to_param": vectors})
    assert kind == "embedding"
    assert torch.equal(load_file(out)["emb_params"], rows())


def test_what_a_textual_inversion_says_is_kept(tmp_path: Path) -> None:
    value = {"string_to_param": {"*": rows()}, "name": "ink", "step": 500, "sd_checkpoint": None}
    _, out = converted(tmp_path, value)
    assert metadata_of(out) == {"format": "pt", "name": "ink", "step": "500"}


def test_a_hypernetwork_is_flattened_with_its_hyperparameters(tmp_path: Path) -> None:
    pair = tuple({"linear.0.weight": rows(4, 4, s), "linear.0.bias": rows(1, 4, s)} for s in (1, 2))
    value = {320: pair, 768: pair, "layer_structure": [1, 2, 1], "activation_func": "relu"}
    kind, out = converted(tmp_path, value)
    assert kind == "hypernetwork"
    found = load_file(out)
    assert len(found) == 8
    assert torch.equal(found["768.1.linear.0.weight"], rows(4, 4, 2))
    said = metadata_of(out)
    assert (json.loads(said["layer_structure"]), said["activation_func"]) == ([1, 2, 1], "relu")


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("import os; os.mkdir(os.environ['VICTIM'])",))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Attack(), r"it holds an object of (builtins\.)?exec, not only tensors"),
        (torch.nn.Linear(2, 2), "it holds an object of torch.nn.modules.linear.Linear"),
        ({"first.weight": torch.ones(2, 2), "first.bias": torch.ones(2)}, "it is a checkpoint"),
    ],
)
def test_classes_and_checkpoints_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, message: str
) -> None:
    monkeypatch.setenv("VICTIM", str(tmp_path / "victim"))
    with pytest.raises(errors.Unsupported, match=message) as refusal:
        converted(tmp_path, value)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["it.pt"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"state_dict": {"a.weight": torch.ones(2, 2)}, "epoch": 3}, "holds state_dict, epoch"),
        ({"what.is.this": torch.ones(2)}, "belong to no adapter we know: what.is.this"),
        ({}, "it holds a dict, not an adapter"),
        ([rows(), rows()], "it holds a list, not an adapter"),
        ("text", "it holds a str, not an adapter"),
        ({"string_to_param": {"*": "text"}}, "its vectors are not a table of numbers"),
        ({"string_to_param": {}}, "its string_to_param holds no vectors"),
        ({768: [1, 2, 3]}, "its entry 768 is not the pair of a hypernetwork"),
        ({768: (1, 2)}, "its entry 768 holds no networks"),
    ],
)
def test_everything_else_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(Refused, match=message):
        flatten(value)


@pytest.mark.parametrize(
    "data",
    [b"", b"not a pickle", pickle.dumps([1, 2], protocol=4), b"PK\x03\x04" + bytes(60)],
    ids=["empty", "text", "no tensors", "broken zip"],
)
def test_what_is_no_pickle_of_tensors_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    source = tmp_path / "it.pt"
    source.write_bytes(data)
    with pytest.raises(errors.Unsupported) as refusal:
        from_pickle(source, tmp_path / "out.safetensors")
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["it.pt"]


def test_a_small_file_that_unfolds_to_much_is_refused(tmp_path: Path) -> None:
    """One number, read with stride 0 as a table of 64 GB."""
    huge = torch.zeros(1).as_strided((4_000_000, 4000), (0, 0))
    with pytest.raises(errors.Unsupported, match=r"its \d+ bytes unfold to 64000000000"):
        converted(tmp_path, {"<cat>": huge})
    assert [path.name for path in tmp_path.iterdir()] == ["it.pt"]


def test_the_pickle_itself_is_never_the_output(tmp_path: Path) -> None:
    source = tmp_path / "it.pt"
    torch.save(LORA, source)
    with pytest.raises(errors.CannotWrite, match="is the pickle itself"):
        from_pickle(source, source)
    with pytest.raises(errors.Unsupported, match="no such file"):
        from_pickle(tmp_path / "none.pt", tmp_path / "out.safetensors")
    with pytest.raises(errors.CannotWrite, match="does not exist"):
        from_pickle(source, tmp_path / "none" / "out.safetensors")
