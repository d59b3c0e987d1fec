"""Module tables against the model classes, and the LDM maps against diffusers' own converters."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
)

from merge.errors import BadCheckpoint
from merge.families import FAMILIES, Family, Layer, Place
from merge.families.checkpoints import read_checkpoint
from merge.families.family import DENOISER
from merge.families.generate import as_text, tables
from merge.families.tables import DATA, as_tree, expand
from merge.formats.header import Header, TensorInfo
from tests.fixtures.families import (
    canonical_state,
    make_models,
    single_file_place,
    single_file_state,
    tiny_family,
)


def test_the_committed_tables_are_what_the_model_classes_say() -> None:
    generated = tables()
    assert {file.stem for file in DATA.glob("*.json")} == set(generated)
    for name, table in generated.items():
        assert (DATA / f"{name}.json").read_text("utf-8") == as_text(table), (
            f"{name} is stale: python -m merge.families.generate"
        )


def test_folding_a_table_loses_neither_layers_nor_their_order() -> None:
    """Neighbours that differ, and numbers that do not follow each other, stay apart."""
    layer, other = ["linear", [4, 4], True], ["linear", [4, 4], False]
    paths = ["b.0.x", "b.0.y", "b.1.x", "b.1.y", "b.3.x", "b.4.y", "b.4.x", "b.5.a.0", "b.5.a.1"]
    leaves = {path: layer for path in paths} | {"b.6.a.0": layer, "b.6.a.1": other, "c": other}
    tree = as_tree(leaves)
    assert list(tree["b"]) == ["0..1", "3", "4", "5", "6"]
    assert list(expand(tree)) == list(leaves.items())


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
    layers = [
        p for p in FAMILIES[name].components[component] if ".layers." in p and "norm" not in p
    ]
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
def test_every_path_of_every_naming_leads_back_to_its_layer_dotted_and_flattened(
    name: str,
) -> None:
    family = FAMILIES[name]
    for component, namings in family.layers.items():
        for layers in namings.values():
            for path, layer in layers.items():
                for spelled in (path, path.removeprefix("text_model.")):
                    for is_flat in (False, True):
                        asked = spelled.replace(".", "_") if is_flat else spelled
                        found = family.find(component, asked, is_flat=is_flat)
                        assert found is not None
                        assert (found[0], found[1].runs) == (component, layer.runs)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_naming_covers_every_row_of_every_module_once(name: str) -> None:
    family = FAMILIES[name]
    for component, namings in family.layers.items():
        modules = family.components[component]
        for layers in namings.values():
            rows = {path: [False] * module.shape[0] for path, module in modules.items()}
            for layer in layers.values():
                assert [run.begin for run in layer.runs] == _starts(layer)
                for run in layer.runs:
                    theirs = rows[run.module][run.first : run.first + run.rows]
                    assert theirs == [False] * run.rows
                    rows[run.module][run.first : run.first + run.rows] = [True] * run.rows
                    assert modules[run.module].shape[1:] == layer.shape[1:]
            assert all(all(module) for module in rows.values())


def _starts(layer: Layer) -> list[int]:
    starts, end = [], 0
    for run in layer.runs:
        starts.append(end)
        end += run.rows
    assert end == layer.shape[0]
    return starts


def test_sdxl_s_original_names_are_those_in_published_adapters() -> None:
    """Names seen in kohya's SDXL files."""
    published = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ),
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "label_emb_0_2": "add_embedding.linear_2",
        "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
    }
    for flat, module in published.items():
        found = FAMILIES["sdxl"].find(DENOISER, flat, is_flat=True)
        assert found is not None
        assert (found[0], found[1].module) == ("unet", module)


def test_the_delta_decides_between_text_encoders_that_share_names() -> None:
    path = "encoder_layers_0_mlp_fc1"
    for named in ("text_encoder", "text_encoder_2", "text_encoder_3", None):
        for extent, expected in (((3072, 768), "text_encoder"), ((5120, 1280), "text_encoder_2")):
            found = FAMILIES["sdxl"].find(named, path, is_flat=True, extent=extent)
            assert found is not None
            assert found[0] == expected
    dotted = FAMILIES["sdxl"].find(
        "text_encoder", path.replace("_", "."), is_flat=False, extent=(5120, 1280)
    )
    assert dotted is not None
    assert dotted[0] == "text_encoder", "a file that names the encoder means it"


def test_a_wider_input_is_found_where_variants_have_one() -> None:
    for extent, shape in {(320, 81): (320, 9, 3, 3), (320, 45): (320, 4, 3, 3)}.items():
        found = FAMILIES["sd15"].find("unet", "conv_in", is_flat=False, extent=extent)
        assert found is not None
        assert found[1].shape == shape


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
            place = single_file_place(family, component, path)
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
    assert folder.places("text_encoder", "text_model.encoder.layers.0.mlp.fc1") == ()
    assert folder.places("unet", "conv_in") == (Place("conv_in.weight"),)
    assert folder.places("unet", "conv_in", "bias") == (), "this header has no bias"


def test_a_clip_l_alone_fits_both_families() -> None:
    modules = FAMILIES["sd15"].components["text_encoder"]
    for strip in ("", "text_model."):
        shapes = {f"{p.removeprefix(strip)}.weight": m.shape for p, m in modules.items()}
        found = read_checkpoint(_header(shapes), "f")
        assert [f.name for f in found.families] == ["sd15", "sdxl"]
        (place,) = found.places("text_encoder", "text_model.encoder.layers.0.mlp.fc1")
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


@pytest.mark.parametrize("file", sorted(DATA.glob("*.json")), ids=lambda file: file.stem)
def test_the_tables_are_plain_json(file: Path) -> None:
    for leaves in json.loads(file.read_text("utf-8")).values():
        if leaves == "ldm":
            continue
        for _, (kind, shape, has_bias, *runs) in expand(leaves):
            assert kind in ("linear", "conv", "norm", "embedding", "parameter")
            assert all(isinstance(n, int) and n > 0 for n in shape)
            assert isinstance(has_bias, bool)
            assert len(runs) <= 1
