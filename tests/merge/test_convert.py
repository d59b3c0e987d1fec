"""Conversion between dialects: the same change, and there and back the same file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from merge import errors
from merge.convert import Converted, convert
from merge.families import FAMILIES
from merge.formats.hashes import sha256_file
from tests.fixtures import adapters, packed
from tests.fixtures.families import registered, tiny_family, tiny_flux
from tests.fixtures.packed import HIDDEN, WIDTH, assert_same, lora, random, write

Q, K, V, MLP = (
    f"transformer.blocks.0.{m}" for m in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
)
FUSED = "lora_unet_layers_0_linear1"
FUSED_ROWS = 3 * WIDTH + HIDDEN


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "packed", packed.packed_family())
    for name in ("sd15-tiny", "sdxl-tiny"):
        monkeypatch.setitem(FAMILIES, name, tiny_family(name))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors" if path.is_dir() else path)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def assert_identical(one: Path, two: Path) -> None:
    """Keys, dtypes, bytes; alphas that moved into a configuration may come back in another dtype."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        other = second[key]
        if key.endswith(".alpha"):
            assert tensor.item() == other.item(), key
        else:
            assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), key
            assert torch.equal(tensor, other), key


def there(path: Path, dialect: str, **options: Any) -> Path:
    """The converted adapter's weights."""
    out = path.parent / f"{path.stem}-{dialect}{'' if dialect == 'peft' else '.safetensors'}"
    convert(path, out, dialect, **options)
    return out / "adapter_model.safetensors" if dialect == "peft" else out


def there_and_back(path: Path, dialect: str, home: str) -> Path:
    """Through another dialect and home again; checks that both hold the same change and bytes."""
    away = there(path, dialect)
    back = there(away, home)
    assert_same(path, away)
    assert_identical(path, back)
    return away


def refused(path: Path, dialect: str, message: str, **options: Any) -> None:
    """Refused with this message, and nothing was written."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(errors.Unsupported, match=message) as refusal:
        convert(path, path.parent / "out", dialect, **options)
    assert str(refusal.value).startswith(f"{path.name}: ")
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("home", "dialect"), [("kohya", "diffusers"), ("comfy", "kohya"), ("diffusers", "comfy")]
)
@pytest.mark.parametrize("family", ["sd15-tiny", "sdxl-tiny"])
def test_key_complete_files_there_and_back(
    family: str, home: str, dialect: str, tmp_path: Path
) -> None:
    made = adapters.make_adapter(
        tmp_path / "f.safetensors",
        family=family,
        dialect=home,
        modules="all",
        components=[*FAMILIES[family].components],
        ranks=[2, 1, 3],
        alphas=[2.0, 1.0, 0.1],
        alpha_dtype=torch.float16,
    )
    there_and_back(made.path, dialect, home)


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "diffusers"])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_peft_folders_there_and_back(component: str, dialect: str, tmp_path: Path) -> None:
    made = adapters.make_adapter(
        tmp_path / "adapter_model.safetensors",
        family="sd15-tiny",
        dialect="peft",
        components=[component],
        modules="all",
        ranks=[2, 1, 3],
        alphas=[2.0, 1.0, 0.1],
        strip_text_model=True,
    )
    there_and_back(made.path, dialect, "peft")


def test_rslora_is_folded_into_alpha(tmp_path: Path) -> None:
    made = adapters.make_adapter(
        tmp_path / "adapter_model.safetensors",
        dialect="peft",
        ranks=9,
        alphas=[6.0],
        use_rslora=True,
    )
    away = there(made.path, "kohya")
    assert {t.item() for k, t in weights(away).items() if k.endswith(".alpha")} == {18.0}
    assert_same(made.path, away)


def test_missing_alphas_become_explicit(tmp_path: Path) -> None:
    made = adapters.make_adapter(tmp_path / "f.safetensors", ranks=[4, 3])
    away = there(made.path, "comfy")
    found = {k: t.item() for k, t in weights(away).items() if k.endswith(".alpha")}
    assert set(found.values()) == {4.0, 3.0}
    assert_same(made.path, away)


def test_linear_factors_become_those_of_a_convolution_in_peft(tmp_path: Path) -> None:
    """SD 1's proj_in is a 1x1 convolution; some trainers save its factors as matrices."""
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    path = write(tmp_path / "f.safetensors", lora(stem, 32, 32, 2, seed=1))
    away = there(path, "peft")
    shapes = {key.rpartition(".lora_")[2]: tuple(t.shape) for key, t in weights(away).items()}
    assert shapes == {"A.weight": (2, 32, 1, 1), "B.weight": (32, 2, 1, 1)}
    assert_same(path, away)


def split_file(path: Path, ranks: dict[str, int], alphas: dict[str, float], **own: Any) -> Path:
    """q, k, v and mlp as diffusers holds them, with a configuration where alphas are given."""
    tensors: dict[str, torch.Tensor] = {}
    for seed, (stem, rank) in enumerate(ranks.items()):
        out = HIDDEN if stem == MLP else WIDTH
        tensors |= lora(stem, out, WIDTH, rank, 10 * seed, **own.get(stem, {}))
    config = {
        "transformer.peft_type": "LORA",
        "transformer.alpha_pattern": {
            f"^{stem.removeprefix('transformer.')}": alpha for stem, alpha in alphas.items()
        },
    }
    tensors |= own.get("tensors", {})
    return write(path, tensors, lora_adapter_metadata=json.dumps(config))


SAME = {Q: 2, K: 2, V: 2, MLP: 2}
MIXED = {Q: 2, K: 1, V: 3, MLP: 4}


@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [
        (SAME, dict.fromkeys(SAME, 1.0)),
        (MIXED, {stem: float(rank) for stem, rank in MIXED.items()}),
        (MIXED, {Q: 1.0, K: 7.0, V: 0.3, MLP: 4.0}),
        ({Q: 4}, {Q: 2.0}),
        ({Q: 4, V: 2}, {Q: 2.0, V: 1.0}),
        ({K: 1, MLP: 3}, {K: 1.0, MLP: 5.0}),
    ],
    ids=["same", "ranks", "alphas", "q", "q and v", "k and mlp"],
)
@pytest.mark.parametrize("dialect", ["kohya", "comfy"])
def test_projections_are_packed_and_come_back_as_they_were(
    dialect: str, ranks: dict[str, int], alphas: dict[str, float], tmp_path: Path
) -> None:
    path = split_file(tmp_path / "f.safetensors", ranks, alphas)
    away = there(path, dialect)
    (up,) = (t for k, t in weights(away).items() if "up" in k)
    assert up.shape == (FUSED_ROWS, sum(ranks.values()))
    assert_same(path, away, exactly=len({alphas[s] / ranks[s] for s in ranks}) == 1)
    assert_identical(path, there(away, "diffusers"))


@pytest.mark.parametrize("idle", [(Q, 0), (V, 2), (MLP, 0)], ids=["first", "inner", "last"])
def test_ranks_that_training_left_at_zero_come_back(idle: tuple[str, int], tmp_path: Path) -> None:
    stem, column = idle
    path = split_file(tmp_path / "f.safetensors", MIXED, {s: float(r) for s, r in MIXED.items()})
    tensors = load_file(path)
    tensors[f"{stem}.lora_B.weight"][:, column] = 0
    there_and_back(write(path, tensors, **metadata(path)), "kohya", "diffusers")


def test_an_untrained_part_comes_back(tmp_path: Path) -> None:
    path = split_file(tmp_path / "f.safetensors", SAME, dict.fromkeys(SAME, 2.0))
    tensors = load_file(path)
    tensors[f"{K}.lora_B.weight"].zero_()
    there_and_back(write(path, tensors, **metadata(path)), "kohya", "diffusers")


def test_parts_of_several_dtypes_come_back(tmp_path: Path) -> None:
    own = {Q: {"dtype": torch.bfloat16}, V: {"dtype": torch.float32}}
    path = split_file(tmp_path / "f.safetensors", SAME, dict.fromkeys(SAME, 2.0), **own)
    there_and_back(path, "kohya", "diffusers")


def test_notes_that_the_factors_do_not_bear_out_are_ignored(tmp_path: Path) -> None:
    path = split_file(tmp_path / "f.safetensors", MIXED, {Q: 1.0, K: 7.0, V: 0.3, MLP: 4.0})
    away = there(path, "kohya")
    said = metadata(away)
    notes = json.loads(said["graft.packed"])
    (parts,) = notes.values()
    assert [note[0] for note in parts.values()] == [*MIXED.values()]
    parts["blocks.0.attn.to_q"][0], parts["blocks.0.attn.to_v"][0] = 3, 2
    write(away, load_file(away), **said | {"graft.packed": json.dumps(notes)})
    back = there(away, "diffusers")
    assert_same(path, back, exactly=False)
    assert weights(back)[f"{Q}.lora_A.weight"].shape[0] == 2


def fused_file(path: Path, rank: int = 3, alpha: float = 1.0) -> Path:
    tensors = lora(FUSED, FUSED_ROWS, WIDTH, rank, seed=1)
    tensors[f"{FUSED}.alpha"] = torch.tensor(alpha)
    final = "lora_unet_final_adaLN_1"
    tensors |= lora(final, 2 * WIDTH, WIDTH, 2, seed=5) | {f"{final}.alpha": torch.tensor(2.0)}
    return write(path, tensors)


@pytest.mark.parametrize("dialect", ["diffusers", "peft"])
def test_a_packed_layer_is_split_with_its_down_shared(dialect: str, tmp_path: Path) -> None:
    path = fused_file(tmp_path / "f.safetensors")
    away = there_and_back(path, dialect, "kohya")
    found = weights(away)
    downs = [t for k, t in found.items() if "blocks.0" in k and "lora_A" in k]
    assert len(downs) == 4
    assert all(torch.equal(down, downs[0]) for down in downs)


def test_swapped_halves_are_swapped_once_there_and_once_back(tmp_path: Path) -> None:
    path = fused_file(tmp_path / "f.safetensors")
    away = there(path, "diffusers")
    up = weights(path)["lora_unet_final_adaLN_1.lora_up.weight"]
    swapped = weights(away)["transformer.norm_out.linear.lora_B.weight"]
    assert torch.equal(swapped, torch.cat([up[WIDTH:], up[:WIDTH]]))
    down = weights(path)["lora_unet_final_adaLN_1.lora_down.weight"]
    assert torch.equal(weights(away)["transformer.norm_out.linear.lora_A.weight"], down)


def loha(stem: str, out: int, inner: int, rank: int, seed: int) -> dict[str, torch.Tensor]:
    shapes = {
        "w1_a": (out, rank),
        "w1_b": (rank, inner),
        "w2_a": (out, rank),
        "w2_b": (rank, inner),
    }
    return {
        f"{stem}.hada_{role}": random(*shape, seed=seed + i)
        for i, (role, shape) in enumerate(shapes.items())
    } | {f"{stem}.alpha": torch.tensor(1.0)}


def lokr(stem: str, w1: tuple[int, int], w2: tuple[int, int], rank: int | None) -> dict[str, Any]:
    found = {f"{stem}.lokr_w1": random(*w1, seed=1), f"{stem}.alpha": torch.tensor(1.0)}
    if rank is None:
        return found | {f"{stem}.lokr_w2": random(*w2, seed=2)}
    found[f"{stem}.lokr_w2_a"] = random(w2[0], rank, seed=3)
    return found | {f"{stem}.lokr_w2_b": random(rank, w2[1], seed=4)}


def test_loha_is_split_and_packed_in_peft_and_back(tmp_path: Path) -> None:
    path = write(tmp_path / "f.safetensors", loha(FUSED, FUSED_ROWS, WIDTH, 3, seed=1))
    away = there_and_back(path, "peft", "kohya")
    assert len(weights(away)) == 4 * 4


def test_loha_of_parts_is_packed_in_blocks_and_comes_back(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for seed, stem in enumerate((Q, K, V)):
        part = loha(f"base_model.model.{stem.partition('.')[2]}", WIDTH, WIDTH, 2, 10 * seed)
        tensors |= {key: t for key, t in part.items() if not key.endswith(".alpha")}
    path = write(tmp_path / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LOHA", "r": 2, "alpha": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    there_and_back(path, "kohya", "peft")


def test_lokr_is_split_where_its_blocks_allow(tmp_path: Path) -> None:
    """8 rows of w2 end where q, k and v do; PEFT has no LoKr of these shapes, so it is refused there."""
    path = write(tmp_path / "f.safetensors", lokr(FUSED, (5, 2), (8, 4), 1))
    refused(path, "peft", "PEFT splits layers into other factors than these, and one way for all")
    path = write(tmp_path / "f.safetensors", lokr(FUSED, (4, 2), (10, 4), 1))
    refused(
        path, "peft", r"linear1: rows of this LoKr move in blocks of 10, .*LoRA at its exact rank"
    )


@pytest.mark.parametrize("rank", [None, 1], ids=["whole", "decomposed"])
def test_lokr_there_and_back_to_peft(rank: int | None, tmp_path: Path) -> None:
    """(8, 16) is 2 x 4 by 4 x 4 for PEFT, whose scale also counts for two whole factors."""
    stem = "lora_unet_layers_0_linear2"
    tensors = lokr(stem, (2, 4), (4, 4), rank)
    if rank is None:
        tensors[f"{stem}.alpha"] = torch.tensor(4.0)  # means nothing here, and 1 in PEFT
    away = there_and_back(write(tmp_path / "f.safetensors", tensors), "peft", "kohya")
    config = json.loads((away.parent / "adapter_config.json").read_text())
    assert (config["peft_type"], config["alpha"] / config["r"]) == ("LOKR", 1.0)


def test_a_scale_of_two_whole_factors_goes_into_them(tmp_path: Path) -> None:
    stem = "base_model.model.blocks.0.attn.to_out.0"
    tensors = lokr(stem, (2, 4), (4, 4), None)
    del tensors[f"{stem}.alpha"]
    path = write(tmp_path / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LOKR", "r": 8, "alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    away = there(path, "kohya")
    assert_same(path, away)
    assert torch.equal(
        weights(away)["lora_unet_layers_0_linear2.lokr_w1"], random(2, 4, seed=1) / 4
    )


def dora(magnitude: tuple[int, ...]) -> dict[str, torch.Tensor]:
    tensors = lora(FUSED, FUSED_ROWS, WIDTH, 3, seed=1) | {f"{FUSED}.alpha": torch.tensor(1.0)}
    return tensors | {f"{FUSED}.dora_scale": random(*magnitude, seed=7)}


@pytest.mark.parametrize("dialect", ["diffusers", "peft"])
def test_dora_over_outputs_is_split_and_joined(dialect: str, tmp_path: Path) -> None:
    path = write(tmp_path / "f.safetensors", dora((FUSED_ROWS, 1)))
    away = there(path, dialect)
    found = {k: t for k, t in weights(away).items() if "magnitude" in k}
    assert {tuple(t.shape) for t in found.values()} == {(WIDTH,), (HIDDEN,)}
    assert all(key.endswith(".lora_magnitude_vector") for key in found)
    assert_identical(path, there(away, "kohya"))


def test_dora_of_a_convolution_has_the_shape_of_the_dialect(tmp_path: Path) -> None:
    stem = "lora_unet_x_embed"
    tensors = {
        f"{stem}.lora_down.weight": random(2, 3, 2, 2),
        f"{stem}.lora_up.weight": random(WIDTH, 2, 1, 1),
        f"{stem}.dora_scale": random(WIDTH, 1, 1, 1),
        f"{stem}.alpha": torch.tensor(2.0),
    }
    path = write(tmp_path / "f.safetensors", tensors)
    away = there(path, "peft")
    key = "base_model.model.pos_embed.proj.lora_magnitude_vector"
    assert weights(away)[key].shape == (1, WIDTH, 1, 1)
    assert_identical(path, there(away, "kohya"))


def test_a_change_of_the_bias_is_beside_the_factors_in_peft(tmp_path: Path) -> None:
    """PEFT multiplies lora_B.bias with the scale, ComfyUI's diff_b is as it is."""
    path = fused_file(tmp_path / "f.safetensors", rank=3, alpha=6.0)
    tensors = load_file(path) | {f"{FUSED}.diff_b": random(FUSED_ROWS, seed=9)}
    away = there_and_back(write(path, tensors), "diffusers", "kohya")
    assert sum(key.endswith(".lora_B.bias") for key in weights(away)) == 4
    config = json.loads(metadata(away)["lora_adapter_metadata"])
    assert config["transformer.lora_bias"] is True


def norm_file(path: Path) -> Path:
    stem = "diffusion_model.layers.0.norm"
    tensors = lora("lora_unet_layers_0_linear2", WIDTH, HIDDEN, 2, seed=1)
    tensors = {
        k.replace("lora_unet_layers_0_", "diffusion_model.layers.0."): t for k, t in tensors.items()
    }
    tensors["diffusion_model.layers.0.linear2.alpha"] = torch.tensor(2.0)
    return write(path, tensors | {f"{stem}.diff": random(WIDTH, seed=3)})


def test_differences_of_norms_stay_beside_lora(tmp_path: Path) -> None:
    path = norm_file(tmp_path / "f.safetensors")
    there_and_back(path, "kohya", "comfy")
    refused(path, "diffusers", "transformer.blocks.0.norm: diffusers cannot hold full factors")


def tucker(stem: str) -> dict[str, torch.Tensor]:
    return {
        f"{stem}.lora_down.weight": random(2, 3, 1, 1, seed=1),
        f"{stem}.lora_mid.weight": random(2, 2, 2, 2, seed=2),
        f"{stem}.lora_up.weight": random(WIDTH, 2, 1, 1, seed=3),
        f"{stem}.alpha": torch.tensor(1.0),
    }


@pytest.mark.parametrize(
    ("tensors", "rank"),
    [
        (loha(FUSED, FUSED_ROWS, WIDTH, 3, seed=1), 9),
        (lokr(FUSED, (4, 2), (10, 4), 2), 4),
        (tucker("lora_unet_x_embed"), 2),
    ],
    ids=["loha", "lokr", "tucker"],
)
@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft", "comfy"])
def test_other_algorithms_become_lora_of_their_exact_rank(
    dialect: str, tensors: dict[str, torch.Tensor], rank: int, tmp_path: Path
) -> None:
    path = write(tmp_path / "f.safetensors", tensors)
    away = there(path, dialect, algorithm="lora")
    found = weights(away)
    assert all("lora_" in key or key.endswith(".alpha") for key in found)
    assert {t.shape[0] for k, t in found.items() if "down" in k or "lora_A" in k} == {rank}
    assert_same(path, away, exactly=False)


def layer_keys(stem: str, **roles: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{stem}.{role}": tensor for role, tensor in roles.items()}


LINEAR = "lora_unet_layers_0_linear2"
OFT = {f"{LINEAR}.oft_blocks": random(2, 4, 4), f"{LINEAR}.alpha": torch.tensor(0.0)}
IA3 = {f"{LINEAR}.weight": random(HIDDEN), f"{LINEAR}.on_input": torch.tensor(1, dtype=torch.uint8)}
FULL = {f"{LINEAR}.diff": random(WIDTH, HIDDEN)}
WHOLE_LOKR = lokr(LINEAR, (2, 4), (4, 4), None)
GLORA = {
    f"{LINEAR}.a1.weight": random(HIDDEN, 2, seed=1),
    f"{LINEAR}.a2.weight": random(2, HIDDEN, seed=2),
    f"{LINEAR}.b1.weight": random(WIDTH, 2, seed=3),
    f"{LINEAR}.b2.weight": random(2, HIDDEN, seed=4),
    f"{LINEAR}.alpha": torch.tensor(1.0),
}


@pytest.mark.parametrize(
    ("tensors", "dialect", "options", "message"),
    [
        (
            dora((FUSED_ROWS, 1)),
            "kohya",
            {"algorithm": "lora"},
            "DoRA rescales the sum with the base",
        ),
        (dora((1, WIDTH)), "diffusers", {}, "DoRA over inputs takes its norms over all rows"),
        (OFT, "kohya", {"algorithm": "lora"}, "oft is no product of low rank; bake it"),
        (OFT, "diffusers", {}, "diffusers cannot hold oft factors; kohya and comfy can hold it"),
        (IA3, "comfy", {}, "ComfyUI's keys cannot hold ia3 factors; kohya can hold it"),
        (IA3, "kohya", {"algorithm": "lora"}, "ia3 is no product of low rank"),
        (FULL, "kohya", {"algorithm": "lora"}, "full is no product of low rank"),
        (FULL, "peft", {}, "PEFT cannot hold full factors; kohya and comfy can hold it"),
        (WHOLE_LOKR, "kohya", {"algorithm": "lora"}, "both of its factors are whole"),
        (GLORA, "kohya", {"algorithm": "lora"}, "the base's own weight; name its base with --base"),
        (GLORA, "peft", {}, "PEFT cannot hold glora factors; kohya and comfy can hold it"),
        (
            tucker("lora_unet_x_embed"),
            "peft",
            {},
            "a Tucker core; kohya and comfy .*--algorithm lora",
        ),
        (
            loha(LINEAR, WIDTH, HIDDEN, 2, 1),
            "diffusers",
            {},
            "hold loha factors; .*--algorithm lora",
        ),
    ],
)
def test_what_is_not_exact_is_refused_with_what_is(
    tensors: dict[str, torch.Tensor],
    dialect: str,
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    refused(write(tmp_path / "f.safetensors", tensors), dialect, message, **options)


def parts_of(*stems: str) -> Iterator[dict[str, torch.Tensor]]:
    for seed, stem in enumerate(stems):
        yield lora(stem, HIDDEN if stem == MLP else WIDTH, WIDTH, 2, 10 * seed)


def test_parts_that_cannot_be_one_layer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    q, k, v, mlp = parts_of(Q, K, V, MLP)
    magnitude = {f"{Q}.lora_magnitude_vector": random(WIDTH)}
    write(path, q | k | v | mlp | magnitude)
    refused(path, "kohya", "linear1: only some of the layers it is made of have DoRA")
    write(path, q | magnitude)
    refused(path, "kohya", "linear1: some of the layers it is made of are not in the file")


def test_what_one_peft_adapter_cannot_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    write(
        path, lora(LINEAR, WIDTH, HIDDEN, 2, 1) | loha("lora_unet_final_adaLN_1", 16, WIDTH, 2, 1)
    )
    refused(path, "peft", "of one algorithm, and this one is of loha, lora; .*--algorithm lora")
    convert(path, tmp_path / "plain", "peft", algorithm="lora")
    write(path, dora((FUSED_ROWS, 1)) | lora(LINEAR, WIDTH, HIDDEN, 2, 1))
    refused(path, "peft", "some layers have DoRA and some have not")
    made = adapters.make_adapter(path, family="sd15-tiny", components=["unet", "text_encoder"])
    refused(
        made.path, "peft", "a PEFT adapter is of one model, and this one is of text_encoder, unet"
    )


def test_metadata_is_carried_over_and_says_where_the_file_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    said = {
        "ss_tag_frequency": "{}",
        "modelspec.trigger_phrase": "ink",
        "modelspec.hash_sha256": "0x1",
        "sshs_model_hash": "abc",
        "graft.recipe": "{}",
        "ss_network_dim": "3",
        "ss_network_module": "mine",
    }
    write(path, load_file(fused_file(path)), **said)
    away = metadata(there(path, "diffusers"))
    assert away.pop("lora_adapter_metadata")
    assert away == {
        "format": "pt",
        "graft.converted_from": f"sha256:{sha256_file(path)}",
        "modelspec.architecture": "packed-v1/lora",
        "modelspec.trigger_phrase": "ink",
        "ss_base_model_version": "packed_1",
        "ss_network_alpha": "1",
        "ss_network_dim": "3",
        "ss_network_module": "mine",
        "ss_tag_frequency": "{}",
    }


def test_kohyas_readers_get_module_rank_and_alpha(tmp_path: Path) -> None:
    path = split_file(tmp_path / "f.safetensors", SAME, dict.fromkeys(SAME, 1.0))
    said = metadata(there(path, "kohya"))
    assert {key: said[key] for key in said if key.startswith("ss_")} == {
        "ss_base_model_version": "packed_1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "4",
    }
    tensors = loha("diffusion_model.layers.0.linear2", WIDTH, HIDDEN, 2, seed=1)
    said = metadata(there(write(tmp_path / "g.safetensors", tensors), "kohya"))
    assert (said["ss_network_module"], said["ss_network_args"]) == (
        "lycoris.kohya",
        '{"algo": "loha"}',
    )


def test_the_report_counts_layers_and_ranks(tmp_path: Path) -> None:
    path = fused_file(tmp_path / "f.safetensors")
    done: Converted = convert(path, tmp_path / "out.safetensors", "diffusers")
    assert done.sha256 == sha256_file(tmp_path / "out.safetensors")
    assert done.to_json() == {
        "sha256": done.sha256,
        "size": (tmp_path / "out.safetensors").stat().st_size,
        "from": "kohya",
        "to": "diffusers",
        "family": "packed",
        "layers": {"read": 2, "written": 5},
        "algorithms": {"lora": 5},
        "ranks": {"min": 2, "max": 3},
        "notices": [],
    }


def test_notices_say_what_is_exact_and_yet_surprises(tmp_path: Path) -> None:
    tensors = loha(LINEAR, WIDTH, HIDDEN, 3, seed=1)
    path = write(tmp_path / "f.safetensors", tensors)
    done = convert(path, tmp_path / "out", "kohya", algorithm="lora")
    assert done.notices == (
        "1 layers have a rank above their own size: exact, and larger than need be",
    )
    made = adapters.make_adapter(path, family="sd15-tiny", ranks=[4, 2], alphas=[1.0, 2.0])
    done = convert(made.path, tmp_path / "out.safetensors", "kohya")
    assert done.notices == (
        "diffusers 0.42 takes the most common alpha of a kohya file for all of its attention",
    )


def test_xlabs_rows_of_a_packed_layer_find_their_place(tmp_path: Path) -> None:
    """Their qkv of a single block is the first three parts of linear1, and names no alpha."""
    with registered(tiny_flux().family):
        double, single = "double_blocks.0.processor", "single_blocks.1.processor"
        tensors = {
            f"{double}.qkv_lora1.down.weight": random(2, 32, seed=1),
            f"{double}.qkv_lora1.up.weight": random(96, 2, seed=2),
            f"{double}.proj_lora2.down.weight": random(2, 32, seed=3),
            f"{double}.proj_lora2.up.weight": random(32, 2, seed=4),
            f"{single}.qkv_lora.down.weight": random(2, 32, seed=5),
            f"{single}.qkv_lora.up.weight": random(96, 2, seed=6),
        }
        path = write(tmp_path / "f.safetensors", tensors)
        split = there(path, "diffusers")
        assert_same(path, split)
        assert sum(key.endswith("lora_A.weight") for key in weights(split)) == 7
        packed_again = there(path, "kohya")
        assert_same(path, packed_again)
        up = weights(packed_again)["lora_unet_single_blocks_1_linear1.lora_up.weight"]
        assert up.shape == (96 + 128, 2)
        assert not up[96:].any()


@pytest.mark.parametrize("dialect", ["kohya", "peft"])
def test_an_output_never_replaces_the_input_or_a_folder(dialect: str, tmp_path: Path) -> None:
    path = fused_file(tmp_path / "f.safetensors")
    before = path.read_bytes()
    for out in (path, tmp_path, tmp_path / "none" / "x"):
        with pytest.raises(errors.CannotWrite):
            convert(path, out, dialect)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]


def test_an_output_never_replaces_the_configuration_or_the_base(tmp_path: Path) -> None:
    folder = there(fused_file(tmp_path / "f.safetensors"), "peft").parent
    before = (folder / "adapter_config.json").read_bytes()
    base = write(tmp_path / "base.safetensors", {"a": random(2)})
    for out in (folder / "adapter_config.json", base):
        with pytest.raises(errors.CannotWrite, match="is what the conversion reads"):
            convert(folder / "adapter_model.safetensors", out, "kohya", base=base)
    assert (folder / "adapter_config.json").read_bytes() == before
