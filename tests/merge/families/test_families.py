"""Module tables against the model classes, and the LDM maps against diffusers' own converters."""

import json

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
)

from merge.errors import BadCheckpoint
from merge.families import FAMILIES, Family
from merge.families.checkpoints import read_checkpoint
from merge.families.generate import DATA, as_text, tables
from merge.formats.header import Header, TensorInfo
from tests.fixtures.families import canonical_state, make_models, single_file_state, tiny_family


def test_the_committed_tables_are_what_the_model_classes_say() -> None:
    generated = tables()
    assert set(generated) == set(FAMILIES)
    for name, components in generated.items():
        assert (DATA / f"{name}.json").read_text("utf-8") == as_text(components), (
            f"{name} is stale: python -m merge.families.generate"
        )


def _counts(family: Family, component: str) -> tuple[int, int, int]:
    """Modules an adapter may have: in attention blocks, plus in resnets and samplers, in all."""
    paths = [p for p, m in family.components[component].items() if m.takes_adapters]
    attention = sum(".attentions." in p for p in paths)
    blocks = sum(any(part in p for part in (".resnets.", "samplers.")) for p in paths)
    return attention, attention + blocks, len(paths)


@pytest.mark.parametrize(("name", "counts"), [("sd15", (192, 278, 282)), ("sdxl", (722, 788, 794))])
def test_the_counts_are_those_of_the_published_models(
    name: str, counts: tuple[int, int, int]
) -> None:
    assert _counts(FAMILIES[name], "unet") == counts
    assert _counts(tiny_family(f"{name}-tiny"), "unet") == counts


@pytest.mark.parametrize(
    ("name", "component", "n"),
    [("sd15", "text_encoder", 72), ("sdxl", "text_encoder", 72), ("sdxl", "text_encoder_2", 192)],
)
def test_text_encoders_have_six_linears_a_layer(name: str, component: str, n: int) -> None:
    layers = [p for p in FAMILIES[name].by_path[component].values() if ".layers." in p]
    assert len(set(layers)) == n


@pytest.mark.parametrize(("name", "n"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_the_unets_have_the_published_number_of_parameters(name: str, n: int) -> None:
    total = 0
    for module in FAMILIES[name].components["unet"].values():
        size = 1
        for dim in module.shape:
            size *= dim
        total += size + (module.shape[0] if module.has_bias else 0)
    assert total == n


@pytest.mark.parametrize("name", FAMILIES)
def test_flattened_names_lead_back_to_one_module(name: str) -> None:
    family = FAMILIES[name]
    for component, modules in family.components.items():
        flat = family.by_flat_path[component]
        for path, module in modules.items():
            if module.takes_adapters:
                assert flat[path.replace(".", "_")] == path
        assert set(flat.values()) == {p for p, m in modules.items() if m.takes_adapters}


def test_sdxl_s_original_names_are_those_in_published_adapters() -> None:
    """Names seen in kohya's SDXL files."""
    flat = FAMILIES["sdxl"].by_flat_path["unet"]
    assert flat["input_blocks_4_1_transformer_blocks_0_attn1_to_q"] == (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    )
    assert flat["output_blocks_2_2_conv"] == "up_blocks.0.upsamplers.0.conv"
    assert flat["input_blocks_3_0_op"] == "down_blocks.0.downsamplers.0.conv"
    assert flat["middle_block_1_proj_in"] == "mid_block.attentions.0.proj_in"
    assert flat["label_emb_0_2"] == "add_embedding.linear_2"
    assert flat["output_blocks_8_0_skip_connection"] == "up_blocks.2.resnets.2.conv_shortcut"


@pytest.mark.parametrize("name", ["sd15-tiny", "sdxl-tiny"])
def test_the_unet_map_is_undone_by_diffusers_converter(name: str) -> None:
    family, models = tiny_family(name), make_models(name)
    single = single_file_state(family, models)
    back = convert_ldm_unet_checkpoint(dict(single), dict(models["unet"].config))
    _assert_same(back, models["unet"].state_dict())


@pytest.mark.parametrize("name", ["sd15-tiny", "sdxl-tiny"])
def test_the_clip_l_map_is_undone_by_diffusers_converter(name: str) -> None:
    family, models = tiny_family(name), make_models(name)
    back = convert_ldm_clip_checkpoint(single_file_state(family, models))
    _assert_same(back, canonical_state(family, models)["text_encoder"])


def test_the_clip_g_map_is_undone_by_diffusers_converter() -> None:
    family, models = tiny_family("sdxl-tiny"), make_models("sdxl-tiny")
    single = single_file_state(family, models)
    encoder = models["text_encoder_2"]
    back = convert_open_clip_checkpoint(encoder, single, prefix="conditioner.embedders.1.model.")
    _assert_same(back, canonical_state(family, models)["text_encoder_2"])


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def _header(shapes: dict[str, tuple[int, ...]]) -> Header:
    tensors = {key: TensorInfo("F16", shape, 0, 0) for key, shape in shapes.items()}
    return Header(tensors, {}, 8, 8)


def _shapes(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + key: tuple(tensor.shape) for key, tensor in state.items()}


def _full_size_shapes(name: str) -> dict[str, tuple[int, ...]]:
    family = FAMILIES[name]
    found: dict[str, tuple[int, ...]] = {}
    for component, modules in family.components.items():
        for path, module in modules.items():
            place = family.single_file_place(component, path)
            shape = module.shape[::-1] if place.is_transposed else module.shape
            found[place.key] = (3 * shape[0], shape[1]) if place.rows else shape
    return found | {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)}


@pytest.mark.parametrize("name", FAMILIES)
def test_single_files_and_folder_files_are_told_apart(name: str) -> None:
    family = FAMILIES[name]
    single = read_checkpoint(_header(_full_size_shapes(name)), "f")
    assert (single.family.name, single.layout) == (name, "ldm")
    assert set(single.components) == set(family.components)
    shapes = {f"{p}.weight": m.shape for p, m in family.components["unet"].items()}
    folder = read_checkpoint(_header(shapes), "f")
    assert (folder.family.name, folder.layout, set(folder.components)) == (
        name,
        "diffusers",
        {"unet"},
    )
    assert folder.place("text_encoder", "text_model.encoder.layers.0.mlp.fc1") is None
    place = folder.place("unet", "conv_in", "bias")
    assert place is not None
    assert place.key == "conv_in.bias"


def test_a_clip_l_alone_fits_both_families() -> None:
    modules = FAMILIES["sd15"].components["text_encoder"]
    for strip in ("", "text_model."):
        shapes = {f"{p.removeprefix(strip)}.weight": m.shape for p, m in modules.items()}
        found = read_checkpoint(_header(shapes), "f")
        assert [f.name for f in found.families] == ["sd15", "sdxl"]
        place = found.place("text_encoder", "text_model.encoder.layers.0.mlp.fc1")
        assert place is not None
        assert place.key in shapes


def test_an_inpainting_unet_is_of_its_family() -> None:
    shapes = _full_size_shapes("sd15")
    shapes["model.diffusion_model.input_blocks.0.0.weight"] = (320, 9, 3, 3)
    assert read_checkpoint(_header(shapes), "f").family.name == "sd15"


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("model.diffusion_model.middle_block.1.proj_in.weight", (1280, 1280)),
        ("model.diffusion_model.input_blocks.0.0.weight", (320, 5, 3, 3)),
        ("model.diffusion_model.out.2.weight", None),
    ],
)
def test_one_wrong_shape_or_missing_key_is_another_model(
    key: str, shape: tuple[int, ...] | None
) -> None:
    shapes = {k: v for k, v in _full_size_shapes("sd15").items() if "cond_stage" not in k}
    assert key in shapes
    if shape is None:
        del shapes[key]
    else:
        shapes[key] = shape
    with pytest.raises(BadCheckpoint, match="f: its keys and shapes are not those of any family"):
        read_checkpoint(_header(shapes), "f")


def test_the_tables_are_plain_json() -> None:
    for name in FAMILIES:
        for modules in json.loads((DATA / f"{name}.json").read_text()).values():
            for kind, shape, has_bias in modules.values():
                assert kind in ("linear", "conv", "norm", "embedding")
                assert all(isinstance(n, int) and n > 0 for n in shape)
                assert isinstance(has_bias, bool)
