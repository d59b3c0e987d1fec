"""Adapters baked into real checkpoints of every layout, against float64 references."""

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge import bake as bake_module
from merge import blocks
from merge.errors import (
    BadCheckpoint,
    BadFile,
    BadRecipe,
    CannotWrite,
    NotFinite,
    Overflow,
    ShapeMismatch,
    UnknownModules,
)
from merge.execute import Cancelled, execute
from merge.families import FAMILIES, Family
from merge.formats import positioned, targets
from merge.formats.folders import folder_digest
from merge.formats.hashes import sha256_file
from merge.plan import BakePlan, plan
from merge.recipe import Recipe
from tests.fixtures.engine import (
    Array,
    MadeAdapter,
    Name,
    adaptable,
    make_adapter,
    make_recipe,
    run,
    some_of,
)
from tests.fixtures.families import (
    make_models,
    single_file_place,
    single_file_state,
    tiny_family,
)
from tests.oracles import rounding as oracle

NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
LAYOUTS = ["folder", "shards", "fp16", "diffusers", "ldm"]
# Every layout and dtype with either family: their product shows no more and takes minutes.
BASES = [
    ("sd15-tiny", "folder", torch.float16),
    ("sd15-tiny", "shards", torch.bfloat16),
    ("sd15-tiny", "fp16", torch.float16),
    ("sd15-tiny", "diffusers", torch.float32),
    ("sd15-tiny", "ldm", torch.bfloat16),
    ("sdxl-tiny", "folder", torch.float32),
    ("sdxl-tiny", "diffusers", torch.bfloat16),
    ("sdxl-tiny", "ldm", torch.float16),
    ("sdxl-tiny", "ldm", torch.float32),
]

State = dict[str, torch.Tensor]


@pytest.fixture(params=["sd15-tiny", "sdxl-tiny"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Family:
    found = tiny_family(request.param)
    monkeypatch.setitem(FAMILIES, found.name, found)
    return found


@pytest.fixture
def sd15(monkeypatch: pytest.MonkeyPatch) -> Family:
    found = tiny_family("sd15-tiny")
    monkeypatch.setitem(FAMILIES, found.name, found)
    return found


def _save_ldm(path: Path, family: Family, dtype: torch.dtype) -> None:
    state = {
        key: tensor.to(dtype).contiguous()
        for key, tensor in single_file_state(family, make_models(family.name)).items()
    }
    # What such files carry besides: other dtypes, empty markers, a VAE.
    state["alphas_cumprod"] = torch.linspace(1, 0, 5, dtype=torch.float32)
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(7)
    state["first_stage_model.decoder.conv_in.weight"] = torch.randn(4, 4, 3, 3).to(dtype)
    state["v_pred"] = torch.zeros(0)
    save_file(state, path, {"modelspec.hash_sha256": "0xabc", "title": "kept"})


def _save_folder(path: Path, family: Family, dtype: torch.dtype, **options: Any) -> None:
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    for name, model in make_models(family.name).items():
        model.to(dtype).save_pretrained(path / name, **options)
        index[name] = ["some", "Class"]
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text("{}")
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.txt").write_text("words")
    index |= {"scheduler": ["some", "Class"], "tokenizer": ["some", "Class"]}
    (path / "model_index.json").write_text(json.dumps(index))
    # What a downloaded folder also holds and a baked one must not.
    (path / "v1-5-pruned.ckpt").write_bytes(b"pickle")
    (path / ".cache").mkdir()
    (path / ".cache" / "lock").write_bytes(b"")
    (path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")


def make_base(folder: Path, family: Family, layout: str, dtype: torch.dtype) -> Path:
    path = folder / "base"
    if layout == "ldm":
        path = path.with_suffix(".safetensors")
        _save_ldm(path, family, dtype)
    elif layout == "diffusers":
        path = path.with_suffix(".safetensors")
        unet = make_models(family.name)["unet"].to(dtype)
        save_file(unet.state_dict(), path, {"format": "pt"})
    elif layout == "shards":
        _save_folder(path, family, dtype, max_shard_size="150KB")
        assert len(list((path / "unet").glob("*.safetensors"))) > 2
    else:
        variant = {"variant": "fp16"} if layout == "fp16" else {}
        _save_folder(path, family, dtype, **variant)
    return path


def _state(path: Path, component: str) -> State:
    """Every tensor of a component by its key in the file, or of a single file."""
    if path.is_file():
        return load_file(path)
    state: State = {}
    for file in sorted((path / component).glob("*.safetensors")):
        state |= load_file(file)
    return state


def _weight(path: Path, family: Family, layout: str, name: Name) -> tuple[str, torch.Tensor]:
    """The stored weight of a module, as its own matrix, and the key it lies in."""
    component, module = name
    state = _state(path, component)
    if layout != "ldm":
        key = f"{module}.weight"
        if key not in state:  # transformers 5.6 and later save CLIPTextModel so
            key = key.removeprefix("text_model.")
        return key, state[key]
    place = single_file_place(family, component, module)
    weight = state[place.key]
    if place.rows is not None:
        weight = weight[slice(*place.rows)]
    return place.key, weight.mT if place.is_transposed else weight


def _bits(tensor: torch.Tensor) -> np.ndarray:
    kinds = {torch.float16: torch.float16, torch.bfloat16: torch.uint16}
    return tensor.contiguous().view(kinds.get(tensor.dtype, tensor.dtype)).numpy()


def _components(layout: str, names: list[Name]) -> list[Name]:
    return [name for name in names if layout != "diffusers" or name[0] == "unet"]


def _two_adapters(folder: Path, family: Family, names: list[Name]) -> list[MadeAdapter]:
    return [
        make_adapter(folder / "a.safetensors", family, names, rank=3, alpha=1.5, size=0.2),
        make_adapter(
            folder / "b.safetensors", family, names[1:], rank=5, alpha=None, seed=2, size=0.2
        ),
    ]


STRENGTHS = [0.7, -0.5]


def _wanted(before: torch.Tensor, made: list[MadeAdapter], name: Name) -> Array:
    pairs = [(a.deltas[name], s) for a, s in zip(made, STRENGTHS, strict=True) if name in a.deltas]
    return oracle.baked(
        before.double().numpy(), [delta for delta, _ in pairs], [s for _, s in pairs]
    )


@pytest.mark.parametrize(("family", "layout", "dtype"), BASES, indirect=["family"])
def test_a_reproducible_bake_is_the_exact_sum_rounded_once(
    family: Family, layout: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    names = _components(layout, some_of(family))
    base, made = make_base(tmp_path, family, layout, dtype), _two_adapters(tmp_path, family, names)
    out = tmp_path / f"out{base.suffix}"
    inputs = [(a.path, s) for a, s in zip(made, STRENGTHS, strict=True)]
    run(out, inputs, base=base, numerics="reproducible")
    for name in names:
        _, before = _weight(base, family, layout, name)
        _, after = _weight(out, family, layout, name)
        wanted = _wanted(before, made, name)
        if dtype is torch.float32:
            # 0.7 times a short binary fraction often lies, but for float64's own rounding, half
            # way between two float32 numbers; either neighbour is then right.
            error = np.abs(after.double().numpy() - wanted)
            assert (error <= oracle.half_unit(wanted, "F32") * (1 + 1e-6)).all()
        else:
            np.testing.assert_array_equal(_bits(after), oracle.stored(wanted, NAMES[dtype]))


@pytest.mark.parametrize(("family", "layout", "dtype"), BASES, indirect=["family"])
def test_a_fast_bake_rounds_once_and_touches_nothing_else(
    family: Family, layout: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    names = _components(layout, some_of(family))
    base, made = make_base(tmp_path, family, layout, dtype), _two_adapters(tmp_path, family, names)
    out = tmp_path / f"out{base.suffix}"
    outcome = run(out, [(a.path, s) for a, s in zip(made, STRENGTHS, strict=True)], base=base)
    touched, same, elements = set(), 0, 0
    for name in names:
        key, before = _weight(base, family, layout, name)
        _, after = _weight(out, family, layout, name)
        wanted = _wanted(before, made, name)
        error = np.abs(after.double().numpy() - wanted)
        # One rounding, plus what a sum of a handful of float32 terms of this size may be off.
        slack = 16 * 2.0**-24 * np.abs(wanted).max()
        assert (error <= oracle.half_unit(wanted, NAMES[dtype]) + slack).all()
        touched.add((name[0] if base.is_dir() else "", key))
        same += int((before == after).sum())
        elements += before.numel()
    for component in {c for c, _ in names} if base.is_dir() else {""}:
        first, second = _state(base, component), _state(out, component)
        assert list(first) == list(second)
        for key, tensor in first.items():
            assert tensor.dtype == second[key].dtype
            if (component, key) not in touched:
                assert torch.equal(_raw(tensor), _raw(second[key]))
    assert outcome.certificate["elements"] == elements
    assert outcome.certificate["unchanged"] == pytest.approx(same / elements, abs=1e-12)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strength_zero_gives_the_base_bit_for_bit(
    sd15: Family, layout: str, tmp_path: Path
) -> None:
    names = _components(layout, some_of(sd15))
    base = make_base(tmp_path, sd15, layout, torch.float16)
    made = make_adapter(tmp_path / "a.safetensors", sd15, names)
    out = tmp_path / f"out{base.suffix}"
    outcome = run(out, [(made.path, 0.0)], base=base)
    for component in ("unet", "text_encoder"):
        before, after = _state(base, component), _state(out, component)
        assert list(before) == list(after)
        assert all(torch.equal(_raw(before[key]), _raw(after[key])) for key in before)
    assert outcome.certificate["elements"] == 0


def test_a_module_of_strength_zero_stays_bit_for_bit(sd15: Family, tmp_path: Path) -> None:
    names = some_of(sd15)
    base = make_base(tmp_path, sd15, "ldm", torch.bfloat16)
    made = make_adapter(tmp_path / "a.safetensors", sd15, names, dtype=torch.bfloat16)
    source = {"ref": str(made.path), "blocks": {"unet.*": 0.0}}
    run(tmp_path / "out.safetensors", [source], base=base)
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    changed = {key for key in before if not torch.equal(_raw(before[key]), _raw(after[key]))}
    assert changed == {single_file_place(sd15, c, m).key for c, m in names if c == "text_encoder"}


def test_only_the_rows_of_a_fused_weight_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """OpenCLIP keeps q, k and v in one tensor; an adapter of q leaves k and v alone."""
    family = tiny_family("sdxl-tiny")
    monkeypatch.setitem(FAMILIES, family.name, family)
    name = ("text_encoder_2", "text_model.encoder.layers.1.self_attn.k_proj")
    base = make_base(tmp_path, family, "ldm", torch.float16)
    made = make_adapter(tmp_path / "a.safetensors", family, [name])
    outcome = run(tmp_path / "out.safetensors", [(made.path, 1.0)], base=base)
    place = single_file_place(family, *name)
    assert place.rows == (24, 48)
    before, after = load_file(base)[place.key], load_file(tmp_path / "out.safetensors")[place.key]
    assert torch.equal(_raw(before[:24]), _raw(after[:24]))
    assert torch.equal(_raw(before[48:]), _raw(after[48:]))
    assert not torch.equal(before[24:48], after[24:48])
    assert outcome.certificate["elements"] == 24 * 24


def test_a_weight_that_is_stored_transposed_gets_the_transposed_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    family = tiny_family("sdxl-tiny")
    monkeypatch.setitem(FAMILIES, family.name, family)
    name = ("text_encoder_2", "text_projection")
    assert single_file_place(family, *name).is_transposed
    base = make_base(tmp_path, family, "ldm", torch.float32)
    made = make_adapter(tmp_path / "a.safetensors", family, [name])
    run(tmp_path / "out.safetensors", [(made.path, 1.0)], base=base, numerics="reproducible")
    _, before = _weight(base, family, "ldm", name)
    _, after = _weight(tmp_path / "out.safetensors", family, "ldm", name)
    wanted = before.double().numpy() + made.deltas[name]
    np.testing.assert_array_equal(after.numpy(), wanted.astype(np.float32))


def test_a_moving_average_in_the_file_is_baked_too(sd15: Family, tmp_path: Path) -> None:
    names = [name for name in some_of(sd15) if name[0] == "unet"]
    base = make_base(tmp_path, sd15, "ldm", torch.float16)
    state = load_file(base)
    averaged = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): tensor.clone()
        for key, tensor in state.items()
        if key.startswith("model.diffusion_model.")
    }
    save_file(state | averaged | {"model_ema.decay": torch.tensor(0.999)}, base)
    made = make_adapter(tmp_path / "a.safetensors", sd15, names)
    run(tmp_path / "out.safetensors", [(made.path, 1.0)], base=base)
    after = load_file(tmp_path / "out.safetensors")
    for key in averaged:
        plain = next(
            k for k in state if "model_ema." + k.removeprefix("model.").replace(".", "") == key
        )
        assert torch.equal(after[key], after[plain])
    assert not torch.equal(
        after[single_file_place(sd15, *names[0]).key], state[single_file_place(sd15, *names[0]).key]
    )


def test_baking_and_unbaking_restores_the_base_within_rounding(
    sd15: Family, tmp_path: Path
) -> None:
    names = _components("diffusers", some_of(sd15))
    base = make_base(tmp_path, sd15, "diffusers", torch.float32)
    made = make_adapter(tmp_path / "a.safetensors", sd15, names)
    run(tmp_path / "there.safetensors", [(made.path, 0.8)], base=base)
    run(tmp_path / "back.safetensors", [(made.path, -0.8)], base=tmp_path / "there.safetensors")
    before, after = load_file(base), load_file(tmp_path / "back.safetensors")
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=3e-7)


def _bake_with(out: Path, planned: BakePlan, workers: int, tile: int, block: int) -> str:
    options = blocks.Options(workers, True, lambda step: None, lambda: False, block)
    digests, _ = bake_module.bake(planned, out, options, tile=tile)
    (digest,) = digests.values()
    assert digest == sha256_file(out)
    return digest


def test_reproducible_bytes_for_any_number_of_threads_tile_and_block(
    sd15: Family, tmp_path: Path
) -> None:
    names = some_of(sd15)
    base, made = (
        make_base(tmp_path, sd15, "ldm", torch.float16),
        _two_adapters(tmp_path, sd15, names),
    )
    inputs = [(a.path, s) for a, s in zip(made, STRENGTHS, strict=True)]
    planned = plan(*make_recipe(inputs, base=base, numerics="reproducible"))
    assert isinstance(planned, BakePlan)
    found = {
        _bake_with(tmp_path / "out.safetensors", planned, *how)
        for how in [
            *((1, 2**18, 2**22), (2, 2**18, 2**22), (5, 2**18, 4096), (2, 1, 2**22)),
            *((3, 100, 999_999), (1, 5000, 77_777)),
        ]
    }
    assert len(found) == 1


def test_reproducible_bytes_of_float32_for_any_block(sd15: Family, tmp_path: Path) -> None:
    """Where float32 is stored the last bits of a product show, and those depend on its rows."""
    names = adaptable(sd15)
    base, made = (
        make_base(tmp_path, sd15, "ldm", torch.float32),
        _two_adapters(tmp_path, sd15, names),
    )
    inputs = [(a.path, s) for a, s in zip(made, STRENGTHS, strict=True)]
    planned = plan(*make_recipe(inputs, base=base, numerics="reproducible"))
    assert isinstance(planned, BakePlan)
    found = {
        _bake_with(tmp_path / "out.safetensors", planned, workers, 4096, block)
        for workers, block in ((1, 2**22), (3, 65_537), (2, 12_288))
    }
    assert len(found) == 1


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="only Linux writes past the page cache")
@pytest.mark.parametrize("fails", [None, errno.EINVAL])
def test_writing_past_the_page_cache_gives_the_same_bytes(
    sd15: Family, monkeypatch: pytest.MonkeyPatch, fails: int | None, tmp_path: Path
) -> None:
    """EINVAL is what a file system says that took the flag and cannot keep it."""
    names = some_of(sd15)
    base = make_base(tmp_path, sd15, "ldm", torch.float16)
    inputs = [(a.path, 0.7) for a in _two_adapters(tmp_path, sd15, names)]
    planned = plan(*make_recipe(inputs, base=base))
    assert isinstance(planned, BakePlan)
    expected = _bake_with(tmp_path / "out.safetensors", planned, 2, 2**18, 2**22)
    real, direct = positioned._write_some, []

    def write(fd: int, data: memoryview, offset: int) -> int:
        is_direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        direct.append(is_direct)
        if is_direct and fails is not None:
            raise OSError(fails, os.strerror(fails))
        return real(fd, data, offset)

    monkeypatch.setattr(positioned, "_write_some", write)
    monkeypatch.setattr(targets, "_DIRECT_FROM_BYTES", 0)
    again = _bake_with(tmp_path / "direct.safetensors", planned, 2, 2**18, 2**16)
    assert again == expected == sha256_file(tmp_path / "direct.safetensors")
    assert all(direct) if fails is None else {True, False} == set(direct)


def test_order_of_inputs_changes_no_byte(sd15: Family, tmp_path: Path) -> None:
    names = some_of(sd15)
    base, made = (
        make_base(tmp_path, sd15, "ldm", torch.float16),
        _two_adapters(tmp_path, sd15, names),
    )
    inputs = [(a.path, s) for a, s in zip(made, STRENGTHS, strict=True)]
    out = tmp_path / "out.safetensors"
    assert run(out, inputs, base=base).sha256 == run(out, inputs[::-1], base=base).sha256


def test_the_portable_way_writes_the_same_bytes(
    sd15: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What Windows and macOS lack (positioned reads and writes, copies in the kernel) has a twin."""
    names = some_of(sd15)
    base, made = (
        make_base(tmp_path, sd15, "ldm", torch.float16),
        _two_adapters(tmp_path, sd15, names),
    )
    inputs = [(a.path, s) for a, s in zip(made, STRENGTHS, strict=True)]
    expected = run(tmp_path / "out.safetensors", inputs, base=base).sha256
    calls = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: calls.append(function) or function(*args)  # type: ignore[func-returns-value]

    monkeypatch.setattr(positioned, "_read_some", counted(positioned._read_portably))
    monkeypatch.setattr(positioned, "_write_some", counted(positioned._write_portably))
    monkeypatch.setattr(positioned, "_reserve", counted(positioned._reserve_portably))
    monkeypatch.setattr(positioned, "_bypass_cache", counted(positioned._bypass_nowhere))
    monkeypatch.setattr(targets, "_DIRECT_FROM_BYTES", 0)
    again = run(tmp_path / "portable.safetensors", inputs, base=base).sha256
    assert again == expected == sha256_file(tmp_path / "portable.safetensors")
    assert set(calls) == {
        positioned._read_portably,
        positioned._write_portably,
        positioned._reserve_portably,
        positioned._bypass_nowhere,
    }


@pytest.mark.parametrize("layout", ["folder", "shards", "fp16"])
def test_a_baked_folder_holds_what_a_pipeline_needs_and_no_stale_weights(
    sd15: Family, layout: str, tmp_path: Path
) -> None:
    names = [name for name in some_of(sd15) if name[0] == "unet"]
    base = make_base(tmp_path, sd15, layout, torch.float16)
    made = make_adapter(tmp_path / "a.safetensors", sd15, names)
    outcome = run(tmp_path / "out", [(made.path, 1.0)], base=base)

    def held(root: Path) -> set[str]:
        return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}

    left = {"v1-5-pruned.ckpt", ".cache/lock", "unet/diffusion_pytorch_model.bin"}
    assert held(tmp_path / "out") == held(base) - left
    assert outcome.sha256 == folder_digest(tmp_path / "out")
    assert outcome.size == sum(
        (tmp_path / "out" / n).stat().st_size for n in held(tmp_path / "out")
    )
    untouched = [n for n in held(base) - left if not n.startswith("unet/")]
    for name in untouched:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("layout", ["folder", "shards"])
def test_no_index_is_copied_whose_shards_are_not(sd15: Family, layout: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, sd15, layout, torch.float16)
    own = {path.relative_to(base) for path in base.rglob("*.index*.json")}
    assert bool(own) == (layout == "shards")
    shards = {"weight_map": {"a.weight": "shard-00001-of-00001.safetensors"}}
    for name in (
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.bin.index.json",
        "text_encoder/pytorch_model.bin.index.fp16.json",
    ):
        (base / name).write_text(json.dumps(shards))
    names = [name for name in some_of(sd15) if name[0] == "unet"][:1]
    made = make_adapter(tmp_path / "a.safetensors", sd15, names)
    run(tmp_path / "out", [(made.path, 1.0)], base=base)
    out = tmp_path / "out"
    assert {path.relative_to(out) for path in out.rglob("*.index*.json")} == own


def test_a_baked_folder_loads_in_diffusers(sd15: Family, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    names = [name for name in some_of(sd15) if name[0] == "unet"]
    base = make_base(tmp_path, sd15, "shards", torch.float32)
    made = make_adapter(tmp_path / "a.safetensors", sd15, names)
    run(tmp_path / "out", [(made.path, 1.0)], base=base)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    module = names[0][1]
    weight = unet.get_submodule(module).weight.detach()
    before = make_models(sd15.name)["unet"].get_submodule(module).weight.detach()
    change = (weight - before).double().numpy()
    np.testing.assert_allclose(change, made.deltas[names[0]], atol=1e-6)


def test_diffusers_fuses_to_the_same_weights(family: Family, tmp_path: Path) -> None:
    """The second implementation; right for kohya files with an alpha in every module."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    names = [name for name in some_of(family) if name[0] == "unet"]
    made = make_adapter(tmp_path / "a.safetensors", family, names, rank=3, alpha=1.5, size=0.3)
    base = make_base(tmp_path, family, "diffusers", torch.float32)
    run(tmp_path / "out.safetensors", [(made.path, 0.7)], base=base)
    unet = make_models(family.name)["unet"]
    is_sdxl = family.name.startswith("sdxl")
    mixin = StableDiffusionXLLoraLoaderMixin if is_sdxl else StableDiffusionLoraLoaderMixin
    state, alphas = mixin.lora_state_dict(dict(load_file(made.path)), unet_config=unet.config)[:2]
    mixin.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
    unet.fuse_lora(lora_scale=0.7)
    baked = load_file(tmp_path / "out.safetensors")
    fused = {key.replace(".base_layer.", "."): t for key, t in unet.state_dict().items()}
    for key, tensor in baked.items():
        torch.testing.assert_close(tensor, fused[key], rtol=0, atol=2e-6)
    changed = {key for key, t in load_file(base).items() if not torch.equal(t, baked[key])}
    assert changed == {f"{module}.weight" for _, module in names}


def test_the_output_keeps_the_bases_metadata_and_says_what_was_done(
    sd15: Family, tmp_path: Path
) -> None:
    base = make_base(tmp_path, sd15, "ldm", torch.float16)
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    out = tmp_path / "out.safetensors"
    outcome = run(out, [(made.path, 0.7)], base=base)
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    recipe = Recipe.load(metadata["graft.recipe"])
    assert recipe.digest() == metadata["graft.recipe_digest"] == outcome.recipe_digest
    assert metadata["graft.base_sha256"] == sha256_file(base)
    assert metadata["title"] == "kept"
    assert "modelspec.hash_sha256" not in metadata
    assert metadata["modelspec.merged_from"] == f"sha256:{sha256_file(made.path)}"
    assert outcome.sha256 == sha256_file(out)
    assert outcome.size == out.stat().st_size


@pytest.mark.parametrize("layout", ["ldm", "shards"])
def test_progress_counts_every_byte_once(sd15: Family, layout: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, sd15, layout, torch.float16)
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    seen: list[tuple[int, int]] = []
    planned = plan(*make_recipe([(made.path, 1.0)], base=base))
    out = tmp_path / f"out{base.suffix}"
    outcome = execute(planned, out, lambda *step: seen.append(step), digest=False)
    assert {total for _, total in seen} == {outcome.size}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == outcome.size


@pytest.mark.parametrize("layout", ["ldm", "folder"])
def test_cancelling_leaves_nothing(
    sd15: Family, monkeypatch: pytest.MonkeyPatch, layout: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(targets, "BLOCK_BYTES", 4096)
    base = make_base(tmp_path, sd15, layout, torch.float16)
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    before = sorted(p.name for p in tmp_path.iterdir())
    steps: list[int] = []
    with pytest.raises(Cancelled):
        execute(
            plan(*make_recipe([(made.path, 1.0)], base=base)),
            tmp_path / f"out{base.suffix}",
            progress=lambda done, total: steps.append(done),
            cancelled=lambda: len(steps) > 5,
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_copying_a_file_that_nothing_changes_can_be_cancelled(sd15: Family, tmp_path: Path) -> None:
    base = make_base(tmp_path, sd15, "folder", torch.float16)
    names = [name for name in some_of(sd15) if name[0] == "text_encoder"]
    made = make_adapter(tmp_path / "a.safetensors", sd15, names)
    steps: list[int] = []
    with pytest.raises(Cancelled):
        execute(
            plan(*make_recipe([(made.path, 1.0)], base=base)),
            tmp_path / "out",
            progress=lambda done, total: steps.append(done),
            cancelled=lambda: True,
        )
    assert steps == []


@pytest.mark.parametrize("layout", ["ldm", "folder"])
@pytest.mark.parametrize("limit", [1_000, 60_000, 300_000])
def test_a_disk_that_fills_up_leaves_nothing(
    sd15: Family, layout: str, limit: int, tmp_path: Path
) -> None:
    """RLIMIT_FSIZE refuses the write that crosses it, as a full disk would, here in any thread."""
    base = make_base(tmp_path, sd15, layout, torch.float16)
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    before = sorted(p.name for p in tmp_path.iterdir())
    planned = plan(*make_recipe([(made.path, 1.0)], base=base))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CannotWrite, match="nothing was written"):
            execute(planned, tmp_path / f"out{base.suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("layout", ["ldm", "folder"])
@pytest.mark.parametrize("nth", [0, 1, 7])
def test_a_write_that_fails_in_any_thread_leaves_nothing(
    sd15: Family,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    nth: int,
    tmp_path: Path,
) -> None:
    base = make_base(tmp_path, sd15, layout, torch.float16)
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    before = sorted(p.name for p in tmp_path.iterdir())
    planned = plan(*make_recipe([(made.path, 1.0)], base=base))
    monkeypatch.setattr(targets, "BLOCK_BYTES", 4096)
    real, calls = positioned._write_some, count()

    def fails(*args: Any) -> Any:
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(positioned, "_write_some", fails)
    with pytest.raises(CannotWrite, match="No space left on device; nothing was written"):
        execute(planned, tmp_path / f"out{base.suffix}")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_too_little_free_space_is_refused_before_a_byte_is_written(
    sd15: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = make_base(tmp_path, sd15, "ldm", torch.float16)
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CannotWrite, match=r"needs \d+ bytes where 1000 are free"):
        run(tmp_path / "out.safetensors", [(made.path, 1.0)], base=base)
    assert not (tmp_path / "out.safetensors").exists()


def test_modules_that_the_base_lacks_are_named_and_can_be_left_out(
    sd15: Family, tmp_path: Path
) -> None:
    base = make_base(tmp_path, sd15, "diffusers", torch.float16)
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    with pytest.raises(UnknownModules, match=r"3 modules are not in the base base.*text_encoder"):
        plan(*make_recipe([(made.path, 1.0)], base=base))
    source = {"ref": str(made.path), "leave_out": ["text_encoder.*"]}
    outcome = run(tmp_path / "out.safetensors", [source], base=base)
    assert len(outcome.certificate["left_out"]) == 3


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_a_text_encoder_alone_is_recognised_by_its_shapes(
    monkeypatch: pytest.MonkeyPatch, component: str, tmp_path: Path
) -> None:
    family = tiny_family("sdxl-tiny")
    monkeypatch.setitem(FAMILIES, family.name, family)
    base = tmp_path / "base.safetensors"
    save_file(make_models(family.name)[component].half().state_dict(), base)
    made = make_adapter(
        tmp_path / "a.safetensors", family, [n for n in some_of(family) if n[0] == component]
    )
    outcome = run(tmp_path / "out.safetensors", [(made.path, 1.0)], base=base)
    assert len(outcome.certificate["modules"]) == len(made.deltas)


def test_another_model_with_diffusers_names_is_baked_by_its_own_keys(
    sd15: Family, tmp_path: Path
) -> None:
    """A layer fewer than the family has: not its table, but its names."""
    name = some_of(sd15)[0]
    base = make_base(tmp_path, sd15, "diffusers", torch.float16)
    state = load_file(base)
    del state["mid_block.resnets.0.conv1.weight"]
    save_file(state, base)
    made = make_adapter(tmp_path / "a.safetensors", sd15, [name])
    run(tmp_path / "out.safetensors", [(made.path, 1.0)], base=base)
    after = load_file(tmp_path / "out.safetensors")
    changed = {key for key in state if not torch.equal(_raw(state[key]), _raw(after[key]))}
    assert changed == {f"{name[1]}.weight"}


@pytest.mark.parametrize("which", ["adapter", "base"])
def test_a_file_that_changed_after_planning_is_refused(
    sd15: Family, which: str, tmp_path: Path
) -> None:
    names = _components("diffusers", some_of(sd15))
    base = make_base(tmp_path, sd15, "diffusers", torch.float16)
    made = make_adapter(tmp_path / "a.safetensors", sd15, names)
    planned = plan(*make_recipe([(made.path, 1.0)], base=base))
    if which == "base":
        make_base(tmp_path, sd15, "diffusers", torch.float32)
    else:
        make_adapter(tmp_path / "a.safetensors", sd15, names, rank=5)
    with pytest.raises(BadFile, match="changed after it was planned"):
        execute(planned, tmp_path / "out.safetensors")


def test_the_wrong_base_is_refused_when_planned(
    sd15: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sdxl = tiny_family("sdxl-tiny")
    monkeypatch.setitem(FAMILIES, sdxl.name, sdxl)
    made = make_adapter(tmp_path / "a.safetensors", sdxl, some_of(sdxl))
    for layout, error in [("ldm", BadCheckpoint), ("folder", UnknownModules)]:
        (tmp_path / layout).mkdir()
        base = make_base(tmp_path / layout, sd15, layout, torch.float16)
        with pytest.raises(error):
            plan(*make_recipe([(made.path, 1.0)], base=base))


def _edited(path: Path, change: State) -> Path:
    save_file(load_file(path) | change, path.with_name("edited.safetensors"))
    return path.with_name("edited.safetensors")


def test_an_inpainting_base_keeps_the_inputs_that_the_adapter_lacks(
    sd15: Family, tmp_path: Path
) -> None:
    base = make_base(tmp_path, sd15, "diffusers", torch.float32)
    edited = _edited(base, {"conv_in.weight": torch.randn(32, 9, 3, 3)})
    made = make_adapter(tmp_path / "a.safetensors", sd15, [("unet", "conv_in")])
    out = tmp_path / "out.safetensors"
    outcome = run(out, [(made.path, 1.0)], base=edited, numerics="reproducible")
    before, after = (load_file(path)["conv_in.weight"] for path in (edited, out))
    assert torch.equal(before[:, 4:], after[:, 4:])
    wanted = before[:, :4].double().numpy() + made.deltas["unet", "conv_in"]
    np.testing.assert_array_equal(after[:, :4].numpy(), wanted.astype(np.float32))
    (note,) = outcome.certificate["notes"]
    assert "unet.conv_in has 9 inputs in the base and 4 in a.safetensors" in note


def test_a_base_with_fewer_inputs_than_the_adapter_is_refused(sd15: Family, tmp_path: Path) -> None:
    base = make_base(tmp_path, sd15, "diffusers", torch.float16)
    edited = _edited(base, {"conv_in.weight": torch.zeros(32, 3, 3, 3, dtype=torch.float16)})
    made = make_adapter(tmp_path / "a.safetensors", sd15, [("unet", "conv_in")])
    with pytest.raises(ShapeMismatch, match=r"the change is \(32, 36\).*takes \(32, 27\)"):
        plan(*make_recipe([(made.path, 1.0)], base=edited))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64])
def test_a_base_in_another_dtype_is_refused(
    sd15: Family, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = make_base(tmp_path, sd15, "diffusers", torch.float16)
    name = some_of(sd15)[0]
    shape = sd15.components["unet"][name[1]].shape
    edited = _edited(base, {f"{name[1]}.weight": torch.zeros(shape).to(dtype)})
    made = make_adapter(tmp_path / "a.safetensors", sd15, [name])
    with pytest.raises(BadCheckpoint, match="a bake needs F16, BF16, F32 or fp8"):
        plan(*make_recipe([(made.path, 1.0)], base=edited))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_base_with_nan_is_refused_and_nothing_is_left(
    sd15: Family, value: float, tmp_path: Path
) -> None:
    base = make_base(tmp_path, sd15, "diffusers", torch.float16)
    name = some_of(sd15)[0]
    weight = load_file(base)[f"{name[1]}.weight"]
    weight.view(-1)[-1] = value
    edited = _edited(base, {f"{name[1]}.weight": weight})
    made = make_adapter(tmp_path / "a.safetensors", sd15, [name])
    with pytest.raises(NotFinite, match=f"{name[1]}.weight holds NaN or Inf"):
        run(tmp_path / "out.safetensors", [(made.path, 1.0)], base=edited)
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


@pytest.mark.parametrize("numerics", ["fast", "reproducible"])
@pytest.mark.parametrize(("dtype", "fits"), [(torch.float16, False), (torch.bfloat16, True)])
def test_a_result_that_does_not_fit_is_refused(
    sd15: Family, numerics: str, dtype: torch.dtype, fits: bool, tmp_path: Path
) -> None:
    base = make_base(tmp_path, sd15, "diffusers", dtype)
    name = some_of(sd15)[0]
    made = make_adapter(tmp_path / "a.safetensors", sd15, [name])
    out, inputs = tmp_path / "out.safetensors", [(made.path, 1e7)]
    if fits:
        run(out, inputs, base=base, numerics=numerics)
        return
    with pytest.raises(Overflow, match="does not fit F16"):
        run(out, inputs, base=base, numerics=numerics)
    assert not out.exists()


def test_what_is_no_checkpoint_is_refused(sd15: Family, tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    with pytest.raises(BadCheckpoint, match="it is an adapter, not a checkpoint"):
        plan(*make_recipe([(made.path, 1.0)], base=made.path))
    other = tmp_path / "other.safetensors"
    save_file({"layer.weight": torch.zeros(2, 2)}, other)
    with pytest.raises(BadCheckpoint, match="not those of Stable Diffusion 1.5, tiny"):
        plan(*make_recipe([(made.path, 1.0)], base=other))
    (tmp_path / "empty").mkdir()
    recipe = Recipe.parse(
        {"kind": "bake", "base": {"ref": "b"}, "inputs": [{"ref": str(made.path)}]}
    )
    with pytest.raises(BadCheckpoint, match=r"neither model_index.json .* nor config.json"):
        plan(recipe, {"b": tmp_path / "empty", str(made.path): made.path})
    with pytest.raises(BadRecipe, match="base: b was not found"):
        plan(recipe, {str(made.path): made.path})


def test_the_base_is_never_written_over(sd15: Family, tmp_path: Path) -> None:
    base = make_base(tmp_path, sd15, "ldm", torch.float16)
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    before = base.read_bytes()
    os.link(base, tmp_path / "link.safetensors")
    for out in (base, tmp_path / "link.safetensors"):
        with pytest.raises(CannotWrite, match="is an input of the recipe itself"):
            run(out, [(made.path, 1.0)], base=base)
    assert base.read_bytes() == before
    folder = make_base(tmp_path, sd15, "folder", torch.float16)
    with pytest.raises(CannotWrite, match="a folder of this name exists"):
        run(folder, [(made.path, 1.0)], base=folder)


LARGE_BAKE = """
import sys, threading
from pathlib import Path
import torch
from merge.execute import execute
from merge.plan import plan
from merge.recipe import Recipe

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

recipe = Recipe.load(Path(sys.argv[1]))
planned = plan(recipe, {ref: Path(ref) for ref in recipe.refs()})
torch.ones(600, 600) @ torch.ones(600, 600)  # what the library allocates once
before, peak = private(), 0
def watch(done, total):
    global peak
    peak = max(peak, private() - before)
    print(done, flush=True)
execute(planned, Path(sys.argv[2]), watch, workers=2)
print("peak", peak, planned.cost.memory_bytes)
"""


def _script(tmp_path: Path, base: State, adapter: State) -> list[str]:
    save_file(base, tmp_path / "base.safetensors")
    save_file(adapter, tmp_path / "a.safetensors")
    inputs = [(tmp_path / "a.safetensors", 1.0)]
    recipe, _ = make_recipe(inputs, base=tmp_path / "base.safetensors")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    return [
        *(sys.executable, "-c", LARGE_BAKE),
        *(str(tmp_path / "recipe.yaml"), str(tmp_path / "out.safetensors")),
    ]


def _large_bake(tmp_path: Path) -> list[str]:
    """A base of 400 MB, all zeros, and an adapter of one of its two layers."""
    base = {
        "blocks.0.proj.weight": torch.zeros(2560, 320, dtype=torch.float16),
        "blocks.0.large": torch.zeros(200_000_000, dtype=torch.float16),
    }
    adapter = {
        "blocks.0.proj.lora_down.weight": torch.randn(4, 320),
        "blocks.0.proj.lora_up.weight": torch.randn(2560, 4),
    }
    return _script(tmp_path, base, adapter)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's RssAnon")
def test_memory_does_not_grow_with_the_base(tmp_path: Path) -> None:
    done = subprocess.run(_large_bake(tmp_path), check=True, stdout=subprocess.PIPE, text=True)
    _, peak, bound = done.stdout.splitlines()[-1].split()
    # Stacks of threads, arenas of the allocator and the hash's buffer come on top of the bound.
    assert int(peak) < int(bound) + 40e6
    assert (tmp_path / "base.safetensors").stat().st_size > 400e6


_SIDE = 3072
_DENSE: dict[str, dict[str, tuple[int, ...]]] = {
    "dora of rows": {
        "lora_down.weight": (8, _SIDE),
        "lora_up.weight": (_SIDE, 8),
        "dora_scale": (_SIDE, 1),
    },
    "dora of inputs": {
        "lora_down.weight": (8, _SIDE),
        "lora_up.weight": (_SIDE, 8),
        "dora_scale": (1, _SIDE),
    },
    "lokr": {"lokr_w1": (32, 32), "lokr_w2": (96, 96)},
    "oft": {"oft_blocks": (96, 32, 32)},
    "full": {"diff": (_SIDE, _SIDE)},
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's RssAnon")
@pytest.mark.parametrize("algorithm", list(_DENSE))
def test_memory_is_bounded_for_changes_that_are_no_product(algorithm: str, tmp_path: Path) -> None:
    """Eight layers of 9.4 million entries: the bound is of those at work, not of all."""
    base, adapter = {}, {}
    for number in range(8):
        stem = f"blocks.{number}.proj"
        base[f"{stem}.weight"] = torch.ones(_SIDE, _SIDE, dtype=torch.float16)
        for suffix, shape in _DENSE[algorithm].items():
            adapter[f"{stem}.{suffix}"] = torch.full(shape, 0.01)
    command = _script(tmp_path, base, adapter)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    _, peak, bound = done.stdout.splitlines()[-1].split()
    assert int(peak) < int(bound) + 40e6
    assert int(bound) < 600e6


@pytest.mark.parametrize("steps", [1, 8, 30, 45])
def test_a_process_that_is_killed_leaves_no_output(steps: int, tmp_path: Path) -> None:
    """At any moment; what was there before stays."""
    command = _large_bake(tmp_path)
    (tmp_path / "out.safetensors").write_bytes(b"what was there")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for _ in range(steps):
            assert child.stdout.readline()
        child.kill()
    names = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("."))
    assert names == ["a.safetensors", "base.safetensors", "out.safetensors", "recipe.yaml"]
    assert (tmp_path / "out.safetensors").read_bytes() == b"what was there"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where the system lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_is_known_before_a_byte(
    sd15: Family, monkeypatch: pytest.MonkeyPatch, small_disk: Path, tmp_path: Path
) -> None:
    base = make_base(tmp_path, sd15, "ldm", torch.float16)
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    planned = plan(*make_recipe([(made.path, 1.0)], base=base))
    with pytest.raises(CannotWrite, match=r"needs \d+ bytes where \d+ are free"):
        execute(planned, small_disk / "out.safetensors")
    # Somebody else may take the room between the question and the answer.
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CannotWrite, match="No space left on device; nothing was written"):
        execute(planned, small_disk / "out.safetensors")
    assert list(small_disk.iterdir()) == []
