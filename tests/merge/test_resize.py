"""An adapter made smaller: the least loss, said in advance, and everything else as it was."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge.errors import BadRecipe, MergeError, Unsupported
from merge.execute import Outcome, execute
from merge.families import FAMILIES, Family
from merge.plan import plan
from merge.recipe import Recipe
from tests.fixtures.engine import MadeAdapter, load_deltas, make_adapter, pin_files, some_of
from tests.fixtures.families import tiny_family


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Family:
    found = tiny_family("sd15-tiny")
    monkeypatch.setitem(FAMILIES, found.name, found)
    return found


METADATA = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "8",
    "ss_network_alpha": "4",
    "ss_network_args": '{"conv_dim": "8", "conv_alpha": "4", "rank_dropout": "0.1"}',
    "ss_tag_frequency": '{"10_inky": {"inky": 10}}',
    "ss_output_name": "ink",
    "modelspec.trigger_phrase": "inky",
    "modelspec.hash_sha256": "0xabc",
    "sshs_model_hash": "abc",
}


@pytest.fixture
def ink(family: Family, tmp_path: Path) -> MadeAdapter:
    return make_adapter(
        tmp_path / "ink.safetensors", family, some_of(family), rank=8, alpha=4, metadata=METADATA
    )


def resize(source: Path, out: Path, **fields: Any) -> Outcome:
    recipe, files = pin_files(
        Recipe.parse({"kind": "resize", "inputs": [{"ref": str(source)}], **fields})
    )
    return execute(plan(recipe, files), out, workers=1)


def test_the_nearest_adapter_of_a_rank_with_its_true_error(
    family: Family, ink: MadeAdapter, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    certificate = resize(ink.path, out, rank={"fixed": 3}, output={"dtype": "float32"}).certificate
    assert certificate["kind"] == "resize"
    found = load_deltas(out, family, some_of(family))
    squared = total = 0.0
    for (component, module), true in ink.deltas.items():
        values = np.linalg.svd(true.reshape(len(true), -1), compute_uv=False)
        error = float(np.linalg.norm(found[component, module] - true))
        assert error == pytest.approx(np.linalg.norm(values[3:]), rel=1e-5)
        said = certificate["modules"][f"{component}.{module}"]
        assert said["truncation"] == pytest.approx(error / np.linalg.norm(true), rel=1e-3)
        squared, total = squared + error**2, total + float((true**2).sum())
    assert certificate["error"] == pytest.approx((squared / total) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("rank", [{"energy": 0.8}, {"shared": 3}, {"budget_bytes": 12_000}])
def test_layers_may_get_ranks_of_their_own(
    family: Family, ink: MadeAdapter, rank: dict[str, Any], tmp_path: Path
) -> None:
    certificate = resize(ink.path, tmp_path / "out.safetensors", rank=rank).certificate
    assert len({its["rank"] for its in certificate["modules"].values()}) > 1
    found = load_deltas(tmp_path / "out.safetensors", family, some_of(family))
    error = sum(float(((found.get(n, 0.0) - d) ** 2).sum()) for n, d in ink.deltas.items())
    norm = sum(float((true**2).sum()) for true in ink.deltas.values())
    assert certificate["error"] == pytest.approx((error / norm) ** 0.5, rel=1e-2)
    if "energy" in rank:
        assert error / norm < 0.2
    if "budget_bytes" in rank:
        tensors = load_file(tmp_path / "out.safetensors").values()
        assert 11_800 < sum(t.numel() * t.element_size() for t in tensors) <= 12_000
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "Dynamic"


def test_it_keeps_what_the_adapter_says_about_itself(ink: MadeAdapter, tmp_path: Path) -> None:
    resize(ink.path, tmp_path / "out.safetensors", rank={"fixed": 3})
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        said = file.metadata()
    for key in ("ss_network_module", "ss_tag_frequency", "ss_output_name"):
        assert said[key] == METADATA[key]
    assert said["modelspec.trigger_phrase"] == "inky"
    assert said["ss_network_dim"] == said["ss_network_alpha"] == "3"
    assert json.loads(said["ss_network_args"]) == {"rank_dropout": "0.1"}
    assert "sshs_model_hash" not in said
    assert "modelspec.hash_sha256" not in said
    assert load_file(tmp_path / "out.safetensors").keys() == load_file(ink.path).keys()
    dtypes = {key: t.dtype for key, t in load_file(tmp_path / "out.safetensors").items()}
    assert {d for key, d in dtypes.items() if not key.endswith(".alpha")} == {torch.float16}


@pytest.mark.parametrize("dialect", ["diffusers", "peft"])
def test_it_keeps_the_dialect(family: Family, dialect: str, tmp_path: Path) -> None:
    names = [name for name in some_of(family) if name[0] == "unet"]
    made = make_adapter(
        tmp_path / "adapter_model.safetensors", family, names, rank=8, dialect=dialect
    )
    resize(made.path, tmp_path / "out", rank={"fixed": 2})
    weights = (
        tmp_path / "out" / "adapter_model.safetensors" if dialect == "peft" else tmp_path / "out"
    )
    tensors = load_file(weights)
    assert tensors.keys() == load_file(made.path).keys()
    assert {t.shape[0] for key, t in tensors.items() if ".lora_A." in key} == {2}
    if dialect == "peft":
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize(
    ("rank", "match"),
    [
        ({"fixed": 8}, "rank.fixed: no layer has more than rank 8"),
        ({"shared": 64}, "rank.shared: no layer has more than rank 8"),
        ({"budget_bytes": 10**6}, r"the factors take \d+ bytes"),
        ({"exact": True}, "a resize needs a rank"),
    ],
)
def test_nothing_is_enlarged(
    ink: MadeAdapter, rank: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(BadRecipe, match=match):
        resize(ink.path, tmp_path / "out.safetensors", rank=rank)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ink.safetensors"]


def test_factors_of_other_algorithms_become_plain_ones(family: Family, tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{stem}.hada_{role}": torch.randn(*shape, generator=generator)
        for role, shape in (
            *(("w1_a", (32, 3)), ("w1_b", (3, 32))),
            *(("w2_a", (32, 3)), ("w2_b", (3, 32))),
        )
    }
    save_file(
        tensors,
        tmp_path / "loha.safetensors",
        {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "loha"}'},
    )
    true = (tensors[f"{stem}.hada_w1_a"] @ tensors[f"{stem}.hada_w1_b"]) * (
        tensors[f"{stem}.hada_w2_a"] @ tensors[f"{stem}.hada_w2_b"]
    )
    resize(tmp_path / "loha.safetensors", tmp_path / "out.safetensors", rank={"fixed": 4})
    made = load_deltas(
        tmp_path / "out.safetensors", family, [("unet", "down_blocks.0.attentions.0.proj_in")]
    )
    (found,) = made.values()
    values = np.linalg.svd(true.double().numpy(), compute_uv=False)
    error = np.linalg.norm(found.reshape(32, 32) - true.numpy())
    assert error == pytest.approx(np.linalg.norm(values[4:]), rel=1e-4)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora"
        assert "ss_network_args" not in file.metadata()


def test_magnitudes_need_the_base_and_are_refused(ink: MadeAdapter, tmp_path: Path) -> None:
    tensors = load_file(ink.path)
    up = next(key for key in tensors if key.endswith("to_q.lora_up.weight"))
    stem = up.removesuffix(".lora_up.weight")
    tensors[f"{stem}.dora_scale"] = torch.ones(tensors[up].shape[0], 1)
    save_file(tensors, tmp_path / "dora.safetensors")
    error: type[MergeError] = Unsupported
    with pytest.raises(error, match=r"dora does to .*to_q depends on the base"):
        resize(tmp_path / "dora.safetensors", tmp_path / "out.safetensors", rank={"fixed": 2})
