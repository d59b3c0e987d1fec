"""Key-complete adapters of transformers: packed by their original code, split by diffusers, and back."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin, SD3LoraLoaderMixin
from peft import AdaLoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file

from merge import errors
from merge.convert import convert
from merge.families import FAMILIES, Family
from merge.families.family import ORIGINAL, OWN
from tests.fixtures import packed
from tests.fixtures.engine import run
from tests.fixtures.families import (
    Tiny,
    registered,
    tiny_flux,
    tiny_llama,
    tiny_lumina2,
    tiny_pixart,
    tiny_sd3,
)
from tests.fixtures.packed import assert_same, changes, random, write
from tests.merge.test_convert import assert_identical, there, weights

# transformers' own deprecation, reached through peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

LOADERS: dict[str, Any] = {
    "FluxTransformer2DModel": FluxLoraLoaderMixin,
    "SD3Transformer2DModel": SD3LoraLoaderMixin,
}
MAKERS = [tiny_flux, tiny_sd3, tiny_pixart, tiny_lumina2]
STEMS: dict[str, tuple[str, Callable[[str], str]]] = {
    "diffusers": (OWN, lambda path: f"transformer.{path}"),
    "kohya": (ORIGINAL, lambda path: f"lora_unet_{path.replace('.', '_')}"),
    "comfy": (ORIGINAL, lambda path: f"diffusion_model.{path}"),
}


@pytest.fixture
def tiny(request: pytest.FixtureRequest) -> Iterator[Tiny]:
    made: Tiny = request.param()
    with registered(made.family):
        yield made


def complete(path: Path, family: Family, dialect: str) -> Path:
    """LoRA of every layer that takes it, of ranks 1, 2 and 3, as the dialect names and packs them."""
    naming, stem = STEMS[dialect]
    tensors: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    layers = family.layers["transformer"][naming].values()
    for number, layer in enumerate(its for its in layers if its.kind in ("linear", "conv")):
        out, inner, *kernel = layer.shape
        rank, at = 1 + number % 3, stem(layer.path)
        down, up = (".lora_A", ".lora_B") if naming == OWN else (".lora_down", ".lora_up")
        tensors[f"{at}{down}.weight"] = random(rank, inner, *kernel, seed=2 * number)
        tensors[f"{at}{up}.weight"] = random(out, rank, *[1] * len(kernel), seed=2 * number + 1)
        if naming == OWN:
            alphas[f"^{layer.path}".replace(".", r"\.")] = 0.5 * rank
        else:
            tensors[f"{at}.alpha"] = torch.tensor(0.5 * rank)
    config = {"transformer.alpha_pattern": alphas, "transformer.peft_type": "LORA"}
    said = {"lora_adapter_metadata": json.dumps(config)} if naming == OWN else {}
    return write(path, tensors, **said)


@pytest.mark.parametrize("tiny", MAKERS, indirect=True, ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    ("home", "dialect"),
    [("diffusers", "kohya"), ("diffusers", "comfy"), ("kohya", "diffusers"), ("comfy", "peft")],
)
def test_complete_adapters_there_and_back(
    tiny: Tiny, home: str, dialect: str, tmp_path: Path
) -> None:
    path = complete(tmp_path / "f.safetensors", tiny.family, home)
    away = there(path, dialect)
    assert_same(path, away)
    assert_identical(path, there(away, home))


@pytest.mark.parametrize("tiny", [tiny_flux, tiny_sd3], indirect=True, ids=lambda m: m.__name__)
def test_diffusers_loads_what_was_packed(tiny: Tiny, tmp_path: Path) -> None:
    path = complete(tmp_path / "f.safetensors", tiny.family, "kohya")
    expected, _ = changes(path)
    away = there(path, "diffusers")
    model = tiny.make()
    before = {key: weight.clone() for key, weight in tiny.state(model).items()}
    loader = LOADERS[type(model).__name__]
    options: dict[str, Any] = {"weight_name": away.name, "return_lora_metadata": True}
    state, *_, said = loader.lora_state_dict(tmp_path, **options)
    alphas = {"network_alphas": None} if loader is FluxLoraLoaderMixin else {}
    loader.load_lora_into_transformer(state, transformer=model, metadata=said, **alphas)
    model.fuse_lora()
    model.unload_lora()
    after = tiny.state(model)
    for (_, module), change in expected.items():
        found = after[f"{module}.weight"] - before[f"{module}.weight"]
        torch.testing.assert_close(
            found.double().flatten(1), change, rtol=1e-4, atol=1e-5, msg=module
        )
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) == len(expected)


def test_all_of_flux_as_diffusers_itself_converts_it(tmp_path: Path) -> None:
    """Rank 1 at full width: diffusers' converter has the widths of FLUX.1 written into it."""
    family = FAMILIES["flux1"]
    path = complete(tmp_path / "f.safetensors", family, "kohya")
    tensors = {
        key: tensor[:1] if "lora_down" in key else tensor[:, :1] if "lora_up" in key else tensor
        for key, tensor in load_file(path).items()
        if "_blocks_" in key
    }
    write(path, tensors)
    assert len(tensors) == 912
    theirs = FluxLoraLoaderMixin.lora_state_dict(dict(tensors))
    done = convert(path, tmp_path / "out.safetensors", "diffusers")
    ours = load_file(tmp_path / "out.safetensors")
    assert (done.layers_read, done.layers_written) == (304, 494)
    assert ours.keys() == theirs.keys()
    alphas = json.loads(metadata(tmp_path / "out.safetensors")["lora_adapter_metadata"])
    patterns = alphas["transformer.alpha_pattern"]
    for key, up in theirs.items():
        if not key.endswith(".lora_B.weight"):
            continue
        down = key.replace("lora_B", "lora_A")
        module = key.removeprefix("transformer.").removesuffix(".lora_B.weight")
        alpha = patterns.get("^" + module.replace(".", r"\."), alphas["transformer.lora_alpha"])
        # They put alpha / rank into the factors; rank 1 makes the products outer ones.
        expected = up.double().flatten() * theirs[down].double().flatten()[0]
        found = alpha * ours[key].double().flatten() * ours[down].double().flatten()[0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6, msg=key)


def metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize(
    ("family", "component", "kohya", "comfy"),
    [
        ("flux1", "text_encoder_2", "lora_te3", "t5xxl"),
        ("sd3-medium", "text_encoder", "lora_te1", "clip_l"),
        ("sd3-medium", "text_encoder_2", "lora_te2", "clip_g"),
        ("sd3-medium", "text_encoder_3", "lora_te3", "t5xxl"),
    ],
)
def test_every_text_encoder_has_its_name(
    family: str, component: str, kohya: str, comfy: str, tmp_path: Path
) -> None:
    table = FAMILIES[family].components[component]
    path, module = next((p, m) for p, m in table.items() if p.endswith((".q", ".q_proj")))
    tensors = packed.lora(f"{component}.{path}", *module.shape, 1, seed=1)
    hint = {"ss_base_model_version": FAMILIES[family].base_versions[0]}
    named = write(tmp_path / "f.safetensors", tensors, **hint)
    away = there(named, "kohya")
    assert {key.partition(".")[0] for key in weights(away)} == {f"{kohya}_{path.replace('.', '_')}"}
    assert_identical(named, there(away, "diffusers"))
    away = there(named, "comfy")
    stem = f"text_encoders.{comfy}.transformer.{path}"
    assert all(key.startswith(f"{stem}.") for key in weights(away))
    assert_identical(named, there(away, "diffusers"))


def test_what_only_a_base_shows_is_asked_for(tmp_path: Path) -> None:
    """VeRA's shared matrices are as wide as the widest layer."""
    get_peft_model(tiny_llama(), CONFIGS["vera"]).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    with pytest.raises(errors.Unsupported, match="whole shape of the layer; name its base with"):
        convert(path, tmp_path / "ours", "peft", algorithm="lora")
    with pytest.raises(errors.Unsupported, match="vera factors are read and not written; --alg"):
        convert(path, tmp_path / "ours", "peft")
    with pytest.raises(errors.Unsupported, match=r"do not show its whole shape; name the base"):
        run(tmp_path / "ours", [(path, 1.0)])
    assert not (tmp_path / "ours").exists()


def test_flux_is_made_of_the_modules_of_its_class() -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    linear = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    layers = FAMILIES["flux1"].layers["transformer"]
    assert linear == {path for path, layer in layers[OWN].items() if layer.kind == "linear"}


TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "vera": VeraConfig(r=6, target_modules=["q_proj", "o_proj"], projection_prng_key=1),
    "adalora": AdaLoraConfig(init_r=6, lora_alpha=3, total_step=10, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_language_models_get_plain_lora_of_the_same_change(kind: str, tmp_path: Path) -> None:
    wrapped = get_peft_model(tiny_llama(), CONFIGS[kind])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "vera_lambda" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    wrapped.save_pretrained(tmp_path / "theirs")
    tiny_llama().save_pretrained(tmp_path / "base")
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    convert(path, tmp_path / "ours", "peft", algorithm="lora", base=tmp_path / "base")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["r"] == 6
    found = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").merge_and_unload()
    expected = wrapped.merge_and_unload()
    for (name, ours), (_, theirs) in zip(
        found.named_parameters(), expected.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_mlx_becomes_peft(tmp_path: Path) -> None:
    """mlx-lm stores both factors the other way round, and the multiplier itself."""
    down, up = random(3, 64, seed=1), random(64, 3, seed=2)
    stem = "model.layers.0.self_attn.q_proj"
    path = write(
        tmp_path / "adapters.safetensors", {f"{stem}.lora_a": down.mT, f"{stem}.lora_b": up.mT}
    )
    config = {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": {"scale": 20.0, "rank": 3},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    away = there(path, "peft")
    assert {key.partition(".lora")[2]: t.shape for key, t in weights(away).items()} == {
        "_A.weight": down.shape,
        "_B.weight": up.shape,
    }
    before = dict(tiny_llama().named_parameters())[f"{stem}.weight"].detach().clone()
    merged = PeftModel.from_pretrained(tiny_llama(), away.parent).merge_and_unload()
    change = dict(merged.named_parameters())[f"{stem}.weight"].detach() - before
    torch.testing.assert_close(change, 20.0 * (up.float() @ down.float()), rtol=1e-4, atol=1e-5)


def test_glora_becomes_lora_of_its_base(tmp_path: Path) -> None:
    """W a1 a2 + b1 b2, of a packed layer, with a base in diffusers' names."""
    modules = packed.packed_family().components["transformer"]
    base = write(
        tmp_path / "base.safetensors",
        {
            f"{path}.{parameter}": random(*shape, seed=seed, dtype=torch.float32)
            for seed, (path, module) in enumerate(modules.items())
            for parameter, shape in (("weight", module.shape), ("bias", module.shape[:1]))
            if parameter == "weight" or module.has_bias
        },
    )
    stem = "lora_unet_layers_0_linear1"
    factors = {
        "a1": random(8, 2, seed=11),
        "a2": random(2, 8, seed=12),
        "b1": random(40, 2, seed=13),
        "b2": random(2, 8, seed=14),
    }
    tensors = {f"{stem}.{role}.weight": tensor for role, tensor in factors.items()}
    with registered(packed.packed_family()):
        path = write(tmp_path / "f.safetensors", tensors | {f"{stem}.alpha": torch.tensor(1.0)})
        away = there(path, "diffusers", algorithm="lora", base=base)
        found, _ = changes(away)
    parts = [f"blocks.0.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    weight = torch.cat([load_file(base)[f"{part}.weight"] for part in parts]).double()
    a1, a2, b1, b2 = (tensor.double() for tensor in factors.values())
    expected = 0.5 * (weight @ a1 @ a2 + b1 @ b2)
    joined = torch.cat([found["transformer", part] for part in parts])
    torch.testing.assert_close(joined, expected, rtol=1e-5, atol=1e-7)
    assert {t.shape[0] for key, t in weights(away).items() if "lora_A" in key} == {4}
