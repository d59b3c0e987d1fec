"""The same files combined by peft and loaded by diffusers, where those are right.

peft 0.21.2 is right for `cat` and `svd` of plain LoRA, with alpha other than rank and with
different ranks; its `linear` has cross terms. diffusers is right for kohya files that state every
alpha. Whole tensors are compared.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from merge.families import FAMILIES, Family
from tests.fixtures.engine import MadeAdapter, Name, load_deltas, make_adapter, run, some_of
from tests.fixtures.families import make_models, tiny_family

STRENGTHS = [0.7, 0.5]


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Family:
    found = tiny_family("sd15-tiny")
    monkeypatch.setitem(FAMILIES, found.name, found)
    return found


def _linear_layers(family: Family) -> list[Name]:
    # peft's `svd` of a convolution is refused or wrong in some versions; `cat` takes both.
    return [n for n in some_of(family) if n[0] == "unet" and ".conv" not in n[1]]


def _peft_folder(
    folder: Path, family: Family, names: list[Name], rank: int, seed: int
) -> MadeAdapter:
    folder.mkdir()
    made = make_adapter(
        folder / "adapter_model.safetensors",
        family,
        names,
        rank=rank,
        alpha=rank / 2,
        seed=seed,
        dialect="peft",
        dtype=torch.float32,
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"target_modules": [module for _, module in names], "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return made


def _with_both(made: list[MadeAdapter]) -> Any:
    from peft import PeftModel

    unet = make_models("sd15-tiny")["unet"]
    model = PeftModel.from_pretrained(unet, made[0].path.parent, adapter_name="a")
    model.load_adapter(made[1].path.parent, adapter_name="b")
    return model


def _peft_deltas(model: Any, names: list[Name], adapter: str) -> dict[Name, np.ndarray]:
    return {
        (component, module): model.base_model.model.get_submodule(module)
        .get_delta_weight(adapter)
        .detach()
        .double()
        .numpy()
        for component, module in names
    }


@pytest.mark.parametrize(("kind", "rank"), [("cat", None), ("svd", 4)])
def test_peft_combines_to_the_same_change(
    family: Family, kind: str, rank: int | None, tmp_path: Path
) -> None:
    names = _linear_layers(family)
    made = [
        _peft_folder(tmp_path / "a", family, names, 3, 1),
        _peft_folder(tmp_path / "b", family, names, 5, 2),
    ]
    model = _with_both(made)
    options = {} if rank is None else {"svd_rank": rank}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(
            ["a", "b"], STRENGTHS, "merged", combination_type=kind, **options
        )
    theirs = _peft_deltas(model, names, "merged")
    run(
        tmp_path / "out.safetensors",
        [(m.path, s) for m, s in zip(made, STRENGTHS, strict=True)],
        rank={"exact": True} if rank is None else {"fixed": rank},
        output={"dialect": "kohya"},
    )
    ours = load_deltas(tmp_path / "out.safetensors", family, names)
    for name in names:
        np.testing.assert_allclose(ours[name], theirs[name].reshape(ours[name].shape), atol=2e-6)


def test_peft_reads_a_merged_adapter_as_it_was_meant(family: Family, tmp_path: Path) -> None:
    """A rank of its own in every module goes through rank_pattern and alpha_pattern."""
    names = _linear_layers(family)
    made = make_adapter(tmp_path / "a.safetensors", family, names, rank=6, dtype=torch.float32)
    small = make_adapter(
        tmp_path / "b.safetensors", family, names[:2], rank=2, seed=2, dtype=torch.float32
    )
    run(
        tmp_path / "merged",
        [(made.path, 0.7), (small.path, -0.5)],
        output={"dialect": "peft"},
        rank={"energy": 0.9999999},
    )
    from peft import PeftModel

    model = PeftModel.from_pretrained(
        make_models("sd15-tiny")["unet"], tmp_path / "merged", adapter_name="m"
    )
    for name, change in _peft_deltas(model, names, "m").items():
        wanted = 0.7 * made.deltas[name] - 0.5 * small.deltas.get(name, 0.0)
        np.testing.assert_allclose(change.reshape(wanted.shape), wanted, atol=2e-5)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_diffusers_reads_a_merged_adapter_as_it_was_meant(
    family: Family, dialect: str, tmp_path: Path
) -> None:
    """Ranks differ between modules, because the second adapter has only some of them."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Mixin

    names = [name for name in some_of(family) if name[0] == "unet"]
    made = make_adapter(tmp_path / "a.safetensors", family, names, rank=6, dtype=torch.float32)
    small = make_adapter(
        tmp_path / "b.safetensors", family, names[::2], rank=2, seed=2, dtype=torch.float32
    )
    run(
        tmp_path / "out.safetensors",
        [(made.path, 0.7), (small.path, -0.5)],
        output={"dialect": dialect},
    )
    unet = make_models("sd15-tiny")["unet"]
    before = {module: unet.get_submodule(module).weight.detach().clone() for _, module in names}
    state, alphas, *metadata = Mixin.lora_state_dict(
        tmp_path / "out.safetensors", unet_config=unet.config, return_lora_metadata=True
    )
    Mixin.load_lora_into_unet(
        state, network_alphas=alphas, unet=unet, metadata=metadata[0] if metadata else None
    )
    unet.fuse_lora()
    for name in names:
        weight = unet.get_submodule(name[1]).base_layer.weight.detach()
        change = (weight - before[name[1]]).double().numpy()
        wanted = 0.7 * made.deltas[name] - 0.5 * small.deltas.get(name, 0.0)
        np.testing.assert_allclose(change, wanted, atol=2e-5)


def test_a_merged_kohya_file_has_the_keys_the_trainer_writes(
    family: Family, tmp_path: Path
) -> None:
    made = make_adapter(tmp_path / "a.safetensors", family, some_of(family))
    run(tmp_path / "out.safetensors", [(made.path, 0.7)])
    assert load_file(tmp_path / "out.safetensors").keys() == load_file(made.path).keys()
