"""Files that diffusers and peft write, read by us; files in our keys, read by diffusers and peft.

Both ways the whole change of every weight is compared with what the other tool computes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from merge.algorithms import read_change
from merge.families import FAMILIES
from merge.formats.adapters import AdapterLayout, read_config, read_layout
from merge.formats.dialects import diffusers_config, peft_config, write_keys
from merge.formats.reader import TensorFile
from merge.formats.writer import write_file
from merge.identify import identify
from tests.fixtures.families import make_models, tiny_family

# transformers' own deprecation, reached through peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

Deltas = dict[tuple[str, str], torch.Tensor]
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv_in"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


@pytest.fixture(autouse=True)
def _tiny_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sd15-tiny", "sdxl-tiny"):
        monkeypatch.setitem(FAMILIES, name, tiny_family(name))


def _config(component: str, **more: Any) -> LoraConfig:
    """Ranks and alphas that differ between modules, by patterns as PEFT's users write them."""
    patterns: dict[str, Any] = {
        "target_modules": TEXT_TARGETS,
        "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {"v_proj": 1, r"layers\.1\.mlp\.fc1": 3},
    }
    if component == "unet":
        patterns = {
            "target_modules": UNET_TARGETS,
            "rank_pattern": {"to_k": 2},
            "alpha_pattern": {r"attn2\.to_k": 5, ".*mid_block.*to_v": 1},
        }
    return LoraConfig(r=4, lora_alpha=6, init_lora_weights="gaussian", **patterns, **more)


def _randomise(model: torch.nn.Module) -> None:
    """B starts at zero, so that a fresh adapter changes nothing."""
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            yield path, layer


def _their_deltas(models: dict[str, torch.nn.Module]) -> Deltas:
    """What the layers themselves say they add, under our names."""
    found = {}
    for component, model in models.items():
        for path, layer in _layers(model):
            path = path.removeprefix("base_model.model.")
            if component != "unet" and not path.startswith(("text_model.", "text_projection")):
                path = f"text_model.{path}"
            (adapter,) = layer.active_adapters
            found[component, path] = layer.get_delta_weight(adapter).detach().double()
    return found


def _our_deltas(path: Path) -> tuple[AdapterLayout, Deltas]:
    found = {}
    with TensorFile(path) as file:
        layout = read_layout(file, name=path.name, config=read_config(path))
        for entry in layout.entries:
            tensors = {role: file.read_tensor(key).double() for role, key in entry.keys.items()}
            shape = entry.layer.shape
            change = read_change(entry.layout, tensors, shape, entry.facts)
            assert entry.layer.module is not None
            delta = change.weight(0, shape[0], None).reshape(shape)
            found[entry.component, entry.layer.module] = delta
    return layout, found


def _assert_alike(found: Deltas, expected: Deltas) -> None:
    assert set(found) == set(expected)
    for name, delta in expected.items():
        # They multiply in float32, we in float64.
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-5, msg=str(name))


def _with_adapters(family: str, **more: Any) -> dict[str, Any]:
    models = make_models(family)
    for component, model in models.items():
        model.add_adapter(_config(component, **more))
        _randomise(model)
    return models


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("family", ["sd15-tiny", "sdxl-tiny"])
def test_what_diffusers_saves_is_read_whole(family: str, is_old: bool, tmp_path: Path) -> None:
    """`is_old` is how its training scripts save: some keys in the older spelling."""
    models = _with_adapters(family)
    convert = convert_state_dict_to_diffusers if is_old else dict
    layers = {
        f"{component}_lora_layers": convert(get_peft_model_state_dict(model))
        for component, model in models.items()
    }
    pipeline = StableDiffusionXLPipeline if family == "sdxl-tiny" else StableDiffusionPipeline
    pipeline.save_lora_weights(tmp_path, **layers, **_collate_lora_metadata(models))
    path = tmp_path / "pytorch_lora_weights.safetensors"
    layout, deltas = _our_deltas(path)
    assert (layout.family, layout.alpha_source) == (family, "metadata")
    _assert_alike(deltas, _their_deltas(models))
    assert [w.code for w in identify(path).warnings] == []


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_what_peft_saves_is_read_whole(
    component: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = make_models("sd15-tiny")[component]
    wrapped = get_peft_model(model, _config(component, **options))
    _randomise(wrapped)
    wrapped.save_pretrained(tmp_path)
    layout, deltas = _our_deltas(tmp_path / "adapter_model.safetensors")
    assert (layout.dialect, layout.alpha_source) == ("peft", "config")
    _assert_alike(deltas, _their_deltas({component: wrapped}))


def test_what_unet_save_lora_adapter_writes_is_read(tmp_path: Path) -> None:
    """No component in its keys nor in its metadata."""
    unet = _with_adapters("sd15-tiny")["unet"]
    unet.save_lora_adapter(tmp_path)
    layout, deltas = _our_deltas(tmp_path / "pytorch_lora_weights.safetensors")
    assert (layout.family, layout.alpha_source) == ("sd15-tiny", "metadata")
    _assert_alike(deltas, _their_deltas({"unet": unet}))


def _write(
    path: Path, family: str, dialect: str, names: list[tuple[str, str]]
) -> dict[tuple[str, str], torch.Tensor]:
    """A random adapter of mixed ranks and alphas in our own keys; its true deltas in float64.

    One alpha for kohya: diffusers 0.42 looks for the alphas of attention layers under names that
    it has just changed, and gives those that differ from the most common one that one.
    """
    generator = torch.Generator().manual_seed(3)
    ranks = {name: 2 + i % 3 for i, name in enumerate(names)}
    alphas = {n: 4.0 if dialect == "kohya" else (4.0, 1.5)[i % 2] for i, n in enumerate(names)}
    keys = write_keys(names, dialect, family)
    tensors: dict[str, torch.Tensor] = {}
    deltas = {}
    for name in names:
        shape = FAMILIES[family].components[name[0]][name[1]].shape
        down = torch.randn(ranks[name], *shape[1:], generator=generator)
        up = torch.randn(shape[0], ranks[name], *[1] * len(shape[2:]), generator=generator)
        roles = {"down": down, "up": up, "alpha": torch.tensor(alphas[name])}
        tensors |= {key: roles[role] for role, key in keys[name].items()}
        product = up.double().flatten(1) @ down.double().flatten(1)
        deltas[name] = (alphas[name] / ranks[name] * product).reshape(shape)
    metadata = {"format": "pt"}
    if dialect == "diffusers":
        metadata["lora_adapter_metadata"] = diffusers_config(ranks, alphas)
    write_file(path, tensors, metadata)
    if dialect == "peft":
        config = peft_config(
            {module: rank for (_, module), rank in ranks.items()},
            {module: alpha for (_, module), alpha in alphas.items()},
        )
        path.with_name("adapter_config.json").write_text(json.dumps(config))
    return deltas


def _names(family: str, components: list[str]) -> list[tuple[str, str]]:
    chosen = []
    for component in components:
        targets = UNET_TARGETS if component == "unet" else TEXT_TARGETS
        modules = FAMILIES[family].components[component].items()
        paths = [p for p, m in modules if m.takes_adapters and p.endswith(tuple(targets))]
        # peft compares every module with every target: a part of SDXL's hundreds is enough.
        step = 1 + len(paths) // 120
        chosen += [(component, path) for path in paths[::step]]
    return chosen


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", ["sd15-tiny", "sdxl-tiny"])
def test_diffusers_reads_the_keys_we_write(family: str, dialect: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    models = make_models(family)
    expected = _write(path, family, dialect, _names(family, [*models]))
    pipeline = _pipeline(family, models)
    pipeline.load_lora_weights(tmp_path)
    _assert_alike(_their_deltas(models), expected)


def _pipeline(family: str, models: dict[str, Any]) -> Any:
    """The least of a pipeline that loads adapters."""
    if family == "sd15-tiny":
        others = ("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
        return StableDiffusionPipeline(
            **models, **dict.fromkeys(others), requires_safety_checker=False
        )
    return StableDiffusionXLPipeline(
        **models,
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        scheduler=DDIMScheduler(),
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )


def test_peft_reads_the_keys_and_the_configuration_we_write(tmp_path: Path) -> None:
    model = make_models("sd15-tiny")["unet"]
    path = tmp_path / "adapter_model.safetensors"
    expected = _write(path, "sd15-tiny", "peft", _names("sd15-tiny", ["unet"]))
    wrapped = PeftModel.from_pretrained(model, tmp_path)
    _assert_alike(_their_deltas({"unet": wrapped}), expected)
