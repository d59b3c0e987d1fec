"""Adapters extracted from tuned checkpoints, against dense float64 references and other loaders."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge.errors import BadCheckpoint, BadRecipe, CannotWrite, MergeError, Overflow, Unsupported
from merge.execute import Cancelled, Outcome, execute
from merge.families import FAMILIES, Family
from merge.plan import plan
from tests.fixtures import packed
from tests.fixtures.checkpoints import VAE, extraction, save_checkpoint, tuned_models, values
from tests.fixtures.engine import Array, Name, make_adapter, run, some_of
from tests.fixtures.families import make_models, tiny_family
from tests.fixtures.packed import changes

F32 = {"dtype": "float32"}


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (tiny_family("sd15-tiny"), tiny_family("sdxl-tiny"), packed.packed_family()):
        monkeypatch.setitem(FAMILIES, found.name, found)


@pytest.fixture
def sd15() -> Family:
    return tiny_family("sd15-tiny")


def extract(out: Path, base: Path, tuned: Path, *, workers: int = 2, **fields: Any) -> Outcome:
    return execute(plan(*extraction(base, tuned, **fields)), out, workers=workers)


def random_like(tensor: torch.Tensor, name: str, size: float = 0.05) -> torch.Tensor:
    seed = sum(name.encode()) * 31 + len(name)
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) * size


def everything(component: str, key: str, tensor: torch.Tensor) -> torch.Tensor | None:
    """A change of everything that adapters can change: weights, biases, norms."""
    if "embedding" in key and "time_embedding" not in key and "add_embedding" not in key:
        return None
    return tensor + random_like(tensor, f"{component}.{key}")


def some_layers(component: str, key: str, tensor: torch.Tensor) -> torch.Tensor | None:
    """A dense change of a few layers with a spectrum that falls, and of nothing else."""
    if component != "unet" or not key.endswith(("to_q.weight", "to_k.weight", "conv1.weight")):
        return None
    matrix = random_like(tensor, key).flatten(1)
    left, values_, right = torch.linalg.svd(matrix, full_matrices=False)
    falling = values_[0] * 0.6 ** torch.arange(len(values_))
    new: torch.Tensor = tensor + (left * falling @ right).reshape(tensor.shape)
    return new


Made = tuple[Path, Path, dict[Name, Array], dict[Name, Array]]
Change = Callable[[str, str, torch.Tensor], torch.Tensor | None]


class Pairs:
    """Makes every pair of checkpoints once: no test writes to them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[Any, ...], Made] = {}

    def __call__(
        self,
        family: Family,
        change: Change,
        layouts: tuple[str, str] = ("ldm", "ldm"),
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    ) -> Made:
        """(base, tuned, the true changes of weights, those of biases)."""
        key = (family.name, change, layouts, dtypes)
        if key not in self._made:
            folder = self._folder / str(len(self._made))
            folder.mkdir()
            self._made[key] = make_pair(folder, family, change, layouts, dtypes)
        return self._made[key]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(tmp_path_factory.mktemp("pairs"))


def make_pair(
    folder: Path,
    family: Family,
    change: Change,
    layouts: tuple[str, str],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> Made:
    paths, found = [], []
    both = (make_models(family.name), tuned_models(family, change))
    for name, models, layout, dtype in zip(("base", "tuned"), both, layouts, dtypes, strict=True):
        found.append(values(family, models, dtype))
        path = folder / (name if layout in ("folder", "shards") else f"{name}.safetensors")
        paths.append(save_checkpoint(path, family, models, layout, dtype))
    weights, biases = (
        {name: found[1][kind][name] - found[0][kind][name] for name in found[0][kind]}
        for kind in (0, 1)
    )
    return paths[0], paths[1], weights, biases


def relative(found: Array, true: Array) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


# The error that stays is rounding of the base inside the adapter's directions, and of the factors.
@pytest.mark.parametrize(
    ("name", "dtype", "most"),
    [
        ("sd15-tiny", torch.float16, 6e-4),
        ("sdxl-tiny", torch.bfloat16, 5e-3),
        ("sd15-tiny", torch.float32, 1e-6),
    ],
)
def test_what_was_baked_in_comes_out_again(
    name: str, dtype: torch.dtype, most: float, tmp_path: Path
) -> None:
    family = tiny_family(name)
    base = save_checkpoint(
        tmp_path / "base.safetensors", family, make_models(family.name), "ldm", dtype
    )
    made = make_adapter(
        tmp_path / "a.safetensors", family, some_of(family), rank=4, size=0.3, dtype=torch.float32
    )
    run(tmp_path / "tuned.safetensors", [(made.path, 1.0)], base=base)
    extract(tmp_path / "out.safetensors", base, tmp_path / "tuned.safetensors")
    found, biases = changes(tmp_path / "out.safetensors")
    assert found.keys() == made.deltas.keys()
    assert not biases
    for module, true in made.deltas.items():
        assert relative(found[module].numpy(), true.reshape(len(true), -1)) < most, module


@pytest.mark.parametrize(
    ("name", "dialect", "layouts"),
    [
        ("sd15-tiny", "kohya", ("ldm", "ldm")),
        ("sdxl-tiny", "comfy", ("ldm", "folder")),
        ("sd15-tiny", "kohya", ("shards", "ldm")),
    ],
)
def test_all_of_a_difference_baked_in_is_the_tuned_checkpoint(
    name: str, dialect: str, layouts: tuple[str, str], pair: Pairs, tmp_path: Path
) -> None:
    family = tiny_family(name)
    base, tuned, weights, biases = pair(family, everything, layouts=layouts)
    extract(
        tmp_path / "out.safetensors",
        base,
        tuned,
        rank={"energy": 1.0},
        output={"dialect": dialect, **F32},
    )
    found = changes(tmp_path / "out.safetensors")
    for kind, true in enumerate((weights, biases)):
        changed = {module for module, change in true.items() if change.any()}
        assert found[kind].keys() == changed
        for module in changed:
            ours = found[kind][module].numpy().reshape(true[module].shape)
            np.testing.assert_allclose(ours, true[module], rtol=0, atol=2e-7, err_msg=str(module))
    kinds = {FAMILIES[family.name].components[c][m].kind for c, m in found[0]}
    assert kinds == {"linear", "conv", "norm"}


def test_the_tuned_checkpoint_comes_back_by_a_bake(
    sd15: Family, pair: Pairs, tmp_path: Path
) -> None:
    base, tuned, *_ = pair(sd15, everything, dtypes=(torch.float16, torch.float16))
    extract(tmp_path / "out.safetensors", base, tuned, rank={"energy": 1.0}, output=F32)
    run(tmp_path / "again.safetensors", [(tmp_path / "out.safetensors", 1.0)], base=base)
    ours, theirs = load_file(tmp_path / "again.safetensors"), load_file(tuned)
    assert ours.keys() == theirs.keys()
    n_other = sum(int((ours[key] != theirs[key]).sum()) for key in theirs)
    # float32 factors put a value on the other side of a rounding once in a hundred thousand.
    assert n_other / sum(tensor.numel() for tensor in theirs.values()) < 1e-4
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key].float(), tensor.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_nearest_adapter_of_a_rank_and_its_true_error(
    sd15: Family, rank: int, pair: Pairs, tmp_path: Path
) -> None:
    base, tuned, weights, _ = pair(sd15, some_layers)
    out = tmp_path / "out.safetensors"
    certificate = extract(out, base, tuned, rank={"fixed": rank}, output=F32).certificate
    found, _ = changes(out)
    squared = total = 0.0
    for (component, module), true in weights.items():
        if not true.any():
            assert (component, module) not in found
            continue
        values_ = np.linalg.svd(true, compute_uv=False)
        error = float(np.linalg.norm(found[component, module].numpy() - true))
        least = float(np.linalg.norm(values_[rank:]))
        assert error == pytest.approx(least, rel=1e-4)
        said = certificate["modules"][f"{component}.{module}"]
        assert said["rank"] == rank
        assert said["norm"] == pytest.approx(np.linalg.norm(true), rel=1e-3)
        assert said["truncation"] == pytest.approx(error / np.linalg.norm(true), rel=1e-3)
        squared, total = squared + error**2, total + float((true**2).sum())
    assert certificate["error"] == pytest.approx((squared / total) ** 0.5, rel=1e-3)
    assert certificate["layers_unchanged"] + len(certificate["modules"]) == 418


def test_energy_gives_every_layer_the_rank_it_needs(
    sd15: Family, pair: Pairs, tmp_path: Path
) -> None:
    base, tuned, weights, _ = pair(sd15, some_layers)
    out = tmp_path / "out.safetensors"
    certificate = extract(out, base, tuned, rank={"energy": 0.95}, output=F32).certificate
    for name, said in certificate["modules"].items():
        squares = np.linalg.svd(weights[tuple(name.split(".", 1))], compute_uv=False) ** 2
        kept = np.cumsum(squares) / squares.sum()
        assert said["rank"] == int((kept >= 0.95).nonzero()[0][0]) + 1
        assert said["truncation"] ** 2 <= 0.05 + 1e-6


def _growing(component: str, key: str, tensor: torch.Tensor) -> torch.Tensor | None:
    """Layers that differ in size: uniform ranks are far from the best."""
    new = some_layers(component, key, tensor)
    if new is None:
        return None
    depth = int(key.split(".")[1]) + 1 if key.split(".")[1].isdecimal() else 1
    return tensor + (new - tensor) * 4.0**depth / 10


@pytest.mark.parametrize("choice", ["budget_bytes", "shared"])
def test_shared_sizes_are_spent_where_the_difference_is(
    sd15: Family, choice: str, pair: Pairs, tmp_path: Path
) -> None:
    base, tuned, weights, _ = pair(sd15, _growing)
    uniform = extract(tmp_path / "uniform.safetensors", base, tuned, rank={"fixed": 4})
    shapes = [its.shape for its in weights.values() if its.any()]
    budget = sum(4 * (out + inner) * 4 + 4 for out, inner in shapes)
    wanted = {choice: 4 if choice == "shared" else budget}
    found = extract(tmp_path / "out.safetensors", base, tuned, rank=wanted, output=F32)
    ranks = {name: its["rank"] for name, its in found.certificate["modules"].items()}
    assert len(set(ranks.values())) > 3
    spent = sum(
        rank * sum(weights[tuple(name.split(".", 1))].shape) * 4 + 4 * (rank > 0)
        for name, rank in ranks.items()
    )
    assert budget * 0.98 < spent <= budget
    assert found.certificate["error"] < 0.7 * uniform.certificate["error"]
    # No exchange of a rank of one layer for ranks of others of the same bytes would be better.
    squares = {
        name: np.linalg.svd(weights[tuple(name.split(".", 1))], compute_uv=False) ** 2
        / sum(weights[tuple(name.split(".", 1))].shape)
        for name in ranks
    }
    taken = min(its[ranks[name] - 1] for name, its in squares.items() if ranks[name])
    left = max(its[ranks[name]] for name, its in squares.items() if ranks[name] < len(its))
    assert left < taken * 1.5


def test_a_layer_that_is_smaller_whole_is_stored_whole(
    sd15: Family, pair: Pairs, tmp_path: Path
) -> None:
    base, tuned, weights, _ = pair(sd15, some_layers)
    out = tmp_path / "out.safetensors"
    certificate = extract(out, base, tuned, rank={"fixed": 16}, output=F32).certificate
    keys = set(load_file(out))
    for name in (name for name, its in weights.items() if its.any()):
        rows, columns = weights[name].shape
        stem = f"{name[0]}.{name[1]}"
        is_whole = f"{stem}.weight" in certificate.get("summed", {})
        assert is_whole == (min(16, rows, columns) * (rows + columns) >= rows * columns)
    assert any(key.endswith(".diff") for key in keys)
    assert any(key.endswith(".lora_up.weight") for key in keys)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
)
def test_rounding_to_another_dtype_is_no_change(
    sd15: Family, dtypes: tuple[torch.dtype, torch.dtype], pair: Pairs, tmp_path: Path
) -> None:
    def change(component: str, key: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor + 0.5 if key == "mid_block.attentions.0.proj_in.weight" else None

    wider = min(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def rounded(component: str, key: str, tensor: torch.Tensor) -> torch.Tensor:
        new = change(component, key, tensor)
        return (tensor if new is None else new).to(wider).float()

    layouts = ("ldm", "folder")
    base, tuned, *_ = pair(sd15, rounded, dtypes=dtypes, layouts=layouts)
    if dtypes[0] is not wider and wider is not torch.float32:
        pytest.skip("neither dtype holds the other's numbers")
    out = tmp_path / "out.safetensors"
    assert extract(out, base, tuned).certificate["modules"].keys() == {
        "unet.mid_block.attentions.0.proj_in"
    }


def test_scaled_8_bit_weights_are_compared_by_what_they_mean(tmp_path: Path) -> None:
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    codes, scale = (weight / 0.01).to(torch.float8_e4m3fn), torch.tensor([0.01])
    key = "blocks.0.proj.weight"
    save_file({key: codes, "blocks.0.proj.scale_weight": scale}, tmp_path / "base.safetensors")
    delta = torch.outer(torch.arange(40.0), torch.arange(24.0)) / 100
    tuned = codes.float() * scale + delta
    save_file({key: tuned}, tmp_path / "tuned.safetensors")
    extract(
        tmp_path / "out",
        tmp_path / "base.safetensors",
        tmp_path / "tuned.safetensors",
        rank={"fixed": 1},
        output=F32,
    )
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    stem = "base_model.model.blocks.0.proj.lora_"
    found = tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"]
    torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-6)


def test_packed_layers_are_extracted_as_the_dialect_packs_them(tmp_path: Path) -> None:
    family = packed.packed_family()
    state, delta = {}, {}
    for path, module in family.components["transformer"].items():
        state[f"{path}.weight"] = packed.random(*module.shape, seed=len(path), dtype=torch.float32)
        delta[path] = packed.random(*module.shape, seed=3, dtype=torch.float32)
        if module.has_bias:
            state[f"{path}.bias"] = torch.zeros(module.shape[0])
    save_file(state, tmp_path / "base.safetensors")
    for path, change in delta.items():
        state[f"{path}.weight"] = state[f"{path}.weight"] + change
    state["blocks.0.attn.to_k.bias"] = torch.arange(8.0)
    save_file(state, tmp_path / "tuned.safetensors")
    for dialect in ("kohya", "comfy"):
        out = tmp_path / f"{dialect}.safetensors"
        extract(
            out,
            tmp_path / "base.safetensors",
            tmp_path / "tuned.safetensors",
            rank={"energy": 1.0},
            output={"dialect": dialect, **F32},
        )
        weights, biases = changes(out)
        for path, change in delta.items():
            ours = weights["transformer", path].reshape(change.shape).float()
            torch.testing.assert_close(ours, change, rtol=0, atol=1e-6)
        assert biases["transformer", "blocks.0.attn.to_k"].tolist() == list(range(8))
        assert any("linear1" in key for key in load_file(out))


def test_rows_of_a_packed_layer_that_are_left_out_do_not_change(
    tmp_path: Path,
) -> None:
    state = {
        f"{path}.weight": packed.random(*module.shape, seed=1, dtype=torch.float32)
        for path, module in packed.packed_family().components["transformer"].items()
    }
    save_file(state, tmp_path / "base.safetensors")
    save_file(
        {k: t + packed.random(*t.shape, seed=2) for k, t in state.items()},
        tmp_path / "t.safetensors",
    )
    out = tmp_path / "out.safetensors"
    found = extract(
        out,
        tmp_path / "base.safetensors",
        tmp_path / "t.safetensors",
        leave_out=["*.to_k", "*norm"],
        output={"dialect": "kohya"},
    )
    weights, _ = changes(out)
    assert not weights["transformer", "blocks.0.attn.to_k"].any()
    assert weights["transformer", "blocks.0.attn.to_q"].any()
    assert found.certificate["left_out"] == [
        "transformer.blocks.0.attn.to_k",
        "transformer.blocks.0.norm",
    ]


def test_norms_have_the_keys_that_lycoris_reads(sd15: Family, pair: Pairs, tmp_path: Path) -> None:
    base, tuned, *_ = pair(sd15, everything)
    extract(tmp_path / "out.safetensors", base, tuned)
    keys = load_file(tmp_path / "out.safetensors").keys()
    stem = "lora_unet_down_blocks_0_resnets_0_norm1"
    assert {f"{stem}.w_norm", f"{stem}.b_norm"} <= keys
    assert f"{stem}.diff" not in keys


def only(ending: str) -> Change:
    def change(component: str, key: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor + 0.1 if f"{component}.{key}".endswith(ending) else None

    return change


TOKENS = "text_encoder.text_model.embeddings.token_embedding"


def test_an_embedding_that_differs_is_refused_by_name(
    sd15: Family, pair: Pairs, tmp_path: Path
) -> None:
    def change(component: str, key: str, tensor: torch.Tensor) -> torch.Tensor | None:
        its = only("token_embedding.weight")(component, key, tensor)
        return (
            only("mid_block.attentions.0.proj_in.weight")(component, key, tensor)
            if its is None
            else its
        )

    base, tuned, *_ = pair(sd15, change)
    out = tmp_path / "out.safetensors"
    with pytest.raises(
        Unsupported, match=rf"1 tensor differs .* no adapter can change \({TOKENS}\)"
    ):
        extract(out, base, tuned)
    assert not out.exists()
    certificate = extract(out, base, tuned, leave_out=[TOKENS]).certificate
    assert certificate["left_out"] == [TOKENS]
    assert list(certificate["modules"]) == ["unet.mid_block.attentions.0.proj_in"]


@pytest.mark.parametrize("layout", ["ldm", "folder"])
def test_a_vae_that_differs_is_refused_and_an_equal_one_is_not(
    sd15: Family, layout: str, tmp_path: Path
) -> None:
    models = make_models("sd15-tiny"), tuned_models(sd15, some_layers)
    end = ".safetensors" if layout == "ldm" else ""
    other = {key: tensor + 1 for key, tensor in VAE.items()}
    f32 = torch.float32
    base, same, tuned = (
        save_checkpoint(tmp_path / f"{name}{end}", sd15, its, layout, f32, vae)
        for name, its, vae in (
            ("base", models[0], VAE),
            ("same", models[1], VAE),
            ("tuned", models[1], other),
        )
    )
    out = tmp_path / "out.safetensors"
    extract(out, base, same)
    expected = out.read_bytes()
    with pytest.raises(Unsupported, match=r"no adapter can change \(vae.decoder.conv_in.weight\)"):
        extract(tmp_path / "not.safetensors", base, tuned)
    assert not (tmp_path / "not.safetensors").exists()
    found = extract(out, base, tuned, leave_out=["vae.*"])
    assert found.certificate["left_out"] == ["vae.*"]
    assert load_file(out).keys() == set(_keys(expected))


def _keys(data: bytes) -> list[str]:
    length = int.from_bytes(data[:8], "little")
    return [key for key in json.loads(data[8 : 8 + length]) if key != "__metadata__"]


def test_a_component_that_one_lacks_is_named_and_may_be_left_out(
    sd15: Family, pair: Pairs, tmp_path: Path
) -> None:
    base, tuned, *_ = pair(sd15, some_layers, layouts=("ldm", "unet"))
    out = tmp_path / "out.safetensors"
    with pytest.raises(
        BadCheckpoint, match=r"tuned.safetensors: it lacks text_encoder\..* and \d+ more"
    ):
        extract(out, base, tuned)
    with pytest.raises(BadCheckpoint, match=r"it lacks .*, which the tuned checkpoint has"):
        extract(out, tuned, base)
    certificate = extract(out, base, tuned, leave_out=["text_encoder.*"]).certificate
    assert certificate["left_out"] == ["text_encoder.*"]
    assert extract(out, base, tuned, only=["unet.*"]).certificate["left_out"] == ["text_encoder.*"]


def test_only_some_layers_may_be_wanted(sd15: Family, pair: Pairs, tmp_path: Path) -> None:
    base, tuned, *_ = pair(sd15, some_layers)
    found = extract(tmp_path / "out.safetensors", base, tuned, only=["*.mid_block.*.to_q"])
    assert found.certificate["modules"].keys() == {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q",
    }


def test_globs_that_match_nothing_are_refused(sd15: Family, pair: Pairs, tmp_path: Path) -> None:
    base, tuned, *_ = pair(sd15, some_layers)
    for field in ("leave_out", "only"):
        fields: dict[str, Any] = {field: ["nowhere.*", "unet.conv_in"]}
        with pytest.raises(BadRecipe, match=rf"tuned.{field}.*nowhere\.\*"):
            extract(tmp_path / "out.safetensors", base, tuned, **fields)


def test_other_models_and_other_shapes_are_refused(
    sd15: Family, pair: Pairs, tmp_path: Path
) -> None:
    base, tuned, *_ = pair(sd15, some_layers)
    sdxl = tiny_family("sdxl-tiny")
    other = save_checkpoint(
        tmp_path / "xl.safetensors", sdxl, make_models("sdxl-tiny"), "ldm", torch.float32
    )
    with pytest.raises(
        BadCheckpoint, match=r"xl.safetensors: it is .*XL.*, and the base base.safetensors"
    ):
        extract(tmp_path / "out.safetensors", base, other)
    state = load_file(tuned)
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    state[key] = torch.cat([state[key], state[key][:2]])
    tuned = tmp_path / "tuned.safetensors"
    save_file(state, tuned)
    with pytest.raises(
        BadCheckpoint, match=r"tuned.*token_embedding is 102 x 16 and in the base 100 x 16"
    ):
        extract(tmp_path / "out.safetensors", base, tuned)
    extract(tmp_path / "out.safetensors", base, tuned, leave_out=[TOKENS])


@pytest.mark.parametrize(
    ("change", "fields", "error", "match"),
    [
        (lambda c, k, t: None, {}, BadRecipe, "nothing differs"),
        (everything, {"output": {"dialect": "diffusers"}}, BadRecipe, "diffusers cannot hold a change of a norm"),
        (everything, {"output": {"dialect": "peft"}}, BadRecipe, "peft holds one model, not text_encoder, unet"),
        (only("conv_in.bias"), {"output": {"dialect": "diffusers"}}, BadRecipe, "a bias alone"),
        (some_layers, {"rank": {"budget_bytes": 10}}, BadRecipe, r"needs \d+ bytes at rank 1"),
        (only("conv_in.weight"), {"only": ["*.to_q"]}, BadRecipe, "nothing differs"),
        (some_layers, {"leave_out": ["*"]}, BadRecipe, "every layer is left out"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_before_anything_is(
    sd15: Family,
    change: Change,
    fields: dict[str, Any],
    error: type[MergeError],
    match: str,
    pair: Pairs,
    tmp_path: Path,
) -> None:
    base, tuned, *_ = pair(sd15, change)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match):
        extract(tmp_path / "out", base, tuned, **fields)
    assert sorted(tmp_path.iterdir()) == before


def huge(component: str, key: str, tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor + 1e6 if key == "conv_in.bias" else None


def test_a_change_that_does_not_fit_the_dtype_is_refused(
    sd15: Family, pair: Pairs, tmp_path: Path
) -> None:
    base, tuned, *_ = pair(sd15, lambda c, k, t: t + 1e6 if k.endswith("conv_in.bias") else None)
    with pytest.raises(Overflow, match=r"unet.conv_in \(bias\) does not fit F16"):
        extract(tmp_path / "out.safetensors", base, tuned, output={"dtype": "float16"})


def test_the_output_is_no_input(sd15: Family, pair: Pairs, tmp_path: Path) -> None:
    base, tuned, *_ = pair(sd15, some_layers)
    before = tuned.read_bytes()
    with pytest.raises(CannotWrite, match="is an input"):
        extract(tuned, base, tuned)
    assert tuned.read_bytes() == before


def test_cancelling_leaves_nothing_and_progress_reaches_the_end(
    sd15: Family, pair: Pairs, tmp_path: Path
) -> None:
    base, tuned, *_ = pair(sd15, some_layers)
    planned, out = plan(*extraction(base, tuned)), tmp_path / "out.safetensors"
    before = sorted(tmp_path.iterdir())
    asked = itertools.count()
    with pytest.raises(Cancelled):
        execute(planned, out, cancelled=lambda: next(asked) > 430)
    assert sorted(tmp_path.iterdir()) == before
    seen: list[tuple[int, int]] = []
    execute(planned, out, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("rank", [{"fixed": 3}, {"energy": 0.9}, {"shared": 3}])
def test_the_same_bytes_for_any_number_of_threads(
    sd15: Family, rank: dict[str, Any], pair: Pairs, tmp_path: Path
) -> None:
    base, tuned, *_ = pair(sd15, everything)
    for workers in (1, 3):
        out = tmp_path / f"{workers}.safetensors"
        extract(out, base, tuned, rank=rank, workers=workers, numerics="reproducible")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_the_file_says_what_it_is_and_what_it_was_made_of(
    sd15: Family, pair: Pairs, tmp_path: Path
) -> None:
    base, tuned, *_ = pair(sd15, some_layers)
    outcome = extract(tmp_path / "out.safetensors", base, tuned)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        said: Mapping[str, str] = file.metadata()
    recipe = json.loads(said["graft.recipe"])
    assert recipe["kind"] == "extract"
    assert said["graft.recipe_digest"] == outcome.recipe_digest
    assert json.loads(said["graft.certificate"]) == outcome.certificate
    assert said["graft.base_sha256"] == recipe["base"]["sha256"]
    assert said["modelspec.merged_from"] == (
        f"sha256:{recipe['tuned']['sha256']}, sha256:{recipe['base']['sha256']}"
    )
    assert said["ss_network_module"] == "networks.lora"
    assert said["ss_network_dim"] == "4"
    assert said["modelspec.architecture"].endswith("/lora")
