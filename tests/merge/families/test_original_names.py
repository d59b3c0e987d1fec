"""Original names and packing against diffusers' own converters, row by row at full size.

Every row of every parameter is one number of its own, so that a thin checkpoint shows where each
row of a full one goes.
"""

import math
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)

from merge.families import FAMILIES, Family, Run
from merge.families.checkpoints import Component
from merge.families.generate import build
from merge.families.layers import ORIGINAL, parameter_key
from merge.families.packing import LDM, pack
from merge.families.sources import COMFY, SOURCES
from tests.fixtures.families import (
    canonical_state,
    make_models,
    registered,
    single_file_state,
    stored_state,
    tiny_family,
    tiny_sd3,
)

State = dict[str, torch.Tensor]

CONVERTERS = {
    "auraflow": "convert_auraflow_transformer_checkpoint_to_diffusers",
    "chroma": "convert_chroma_transformer_checkpoint_to_diffusers",
    "flux": "convert_flux_transformer_checkpoint_to_diffusers",
    "flux2": "convert_flux2_transformer_checkpoint_to_diffusers",
    "hunyuan-video": "convert_hunyuan_video_transformer_to_diffusers",
    "ltx": "convert_ltx_transformer_checkpoint_to_diffusers",
    "lumina2": "convert_lumina2_to_diffusers",
    "mochi": "convert_mochi_transformer_checkpoint_to_diffusers",
    "sana": "convert_sana_transformer_to_diffusers",
    "sd3": "convert_sd3_transformer_checkpoint_to_diffusers",
    "wan": "convert_wan_transformer_to_diffusers",
    "z-image": "convert_z_image_transformer_checkpoint_to_diffusers",
}
# Tensors that converters ask for and that are no layers: position embeddings and an empty prompt.
NO_LAYERS = {"sd3": ["pos_embed"], "sana": ["pos_embed", "y_embedder.y_embedding"]}
PROVEN = [
    name
    for name, family in FAMILIES.items()
    if family.tables[family.denoiser].namings.get(ORIGINAL) in CONVERTERS
]


def thin_state(family: Family, component: str) -> State:
    """Every parameter by our own keys, one column wide, every row another number."""
    state, n = {}, 0
    for path, module in family.components[component].items():
        for parameter in ("weight", "bias") if module.has_bias else ("weight",):
            rows = module.shape[0]
            key = parameter_key(path, module.kind, parameter)
            state[key] = torch.arange(n, n + rows).unsqueeze(1)
            n += rows
    return state


def test_all_rules_but_pixart_s_and_second_spellings_are_proven() -> None:
    used = {
        rules
        for family in FAMILIES.values()
        for table in family.tables.values()
        for rules in table.namings.values()
    }
    assert used == {*CONVERTERS, LDM, "pixart", "hunyuan-video-comfy"}


@pytest.mark.parametrize("name", PROVEN)
def test_the_map_is_undone_by_diffusers_converter(name: str) -> None:
    family = FAMILIES[name]
    rules = family.tables["transformer"].namings[ORIGINAL]
    state = thin_state(family, "transformer")
    stored = stored_state(family, Component("transformer", "", ORIGINAL), state)
    extra = NO_LAYERS.get(rules, [])
    stored |= {key: torch.zeros(1, 1) for key in extra}
    back = getattr(single_file_utils, CONVERTERS[rules])(dict(stored))
    back.pop("pos_embed.pos_embed" if rules == "sd3" else "", None)
    _assert_same(back, state)


def test_the_map_of_tiny_weights_is_undone_by_diffusers_converter() -> None:
    """SD3's converter takes any width, so that whole weights can make the journey."""
    tiny = tiny_sd3()
    model = tiny.make()
    stored = stored_state(tiny.family, Component("transformer", "", ORIGINAL), tiny.state(model))
    stored["pos_embed"] = model.pos_embed.pos_embed
    with registered(tiny.family):
        back = convert_sd3_transformer_checkpoint_to_diffusers(dict(stored))
    _assert_same(back, model.state_dict())


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_unet_map_is_undone_by_diffusers_converter(name: str) -> None:
    family, models = tiny_family(f"{name}-tiny"), make_models(f"{name}-tiny")
    single = single_file_state(family, models)
    back = convert_ldm_unet_checkpoint(dict(single), dict(models["unet"].config))
    _assert_same(back, models["unet"].state_dict())


@pytest.mark.parametrize("name", ["sd2", "sdxl-refiner"])
def test_the_full_size_unet_map_is_undone_by_diffusers_converter(name: str) -> None:
    family = FAMILIES[name]
    state = thin_state(family, "unet")
    prefix = "model.diffusion_model."
    stored = stored_state(family, Component("unet", prefix, ORIGINAL), state)
    config = dict(build(SOURCES[name]).config)
    _assert_same(convert_ldm_unet_checkpoint(stored, config), state)


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


def _assert_same(found: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_packed_rows_are_those_of_published_models() -> None:
    """Read from FLUX.1 with rows of the width 3072, and from Lumina 2, whose k and v are narrow."""
    flux = FAMILIES["flux1"].layers["transformer"][ORIGINAL]
    block, single = "transformer_blocks.7.attn", "single_transformer_blocks.9"
    assert flux["double_blocks.7.img_attn.qkv"].runs == (
        Run(f"{block}.to_q", 0, 0, 3072),
        Run(f"{block}.to_k", 0, 3072, 3072),
        Run(f"{block}.to_v", 0, 6144, 3072),
    )
    assert flux["single_blocks.9.linear1"].shape == (21504, 3072)
    assert flux["single_blocks.9.linear1"].runs[3] == Run(f"{single}.proj_mlp", 0, 9216, 12288)
    assert flux["final_layer.adaLN_modulation.1"].runs == (
        Run("norm_out.linear", 3072, 0, 3072),
        Run("norm_out.linear", 0, 3072, 3072),
    )
    lumina = FAMILIES["lumina2"].layers["transformer"][ORIGINAL]
    assert [run.begin for run in lumina["layers.3.attention.qkv"].runs] == [0, 2304, 3072]
    assert lumina["layers.3.attention.qkv"].shape == (3840, 2304)


def test_only_the_last_block_of_sd3_swaps_the_halves_of_its_context_modulation() -> None:
    layers = FAMILIES["sd3-medium"].layers["transformer"][ORIGINAL]
    for block in range(24):
        layer = layers[f"joint_blocks.{block}.context_block.adaLN_modulation.1"]
        assert (len(layer.runs), layer.shape[0]) == ((2, 3072) if block == 23 else (1, 9216))


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        (
            "pixart",
            {
                "blocks.27.attn.qkv": "transformer_blocks.27.attn1.to_q",
                "blocks.0.cross_attn.kv_linear": "transformer_blocks.0.attn2.to_k",
                "t_block.1": "adaln_single.linear",
                "y_embedder.y_proj.fc2": "caption_projection.linear_2",
            },
        ),
        (
            "hunyuan-video",
            {
                "double_blocks.3.img_attn.qkv": "transformer_blocks.3.attn.to_q",
                "double_blocks.3.txt_mlp.2": "transformer_blocks.3.ff_context.net.2",
                "double_blocks.3.img_mod.lin": "transformer_blocks.3.norm1.linear",
                "single_blocks.39.modulation.lin": "single_transformer_blocks.39.norm.linear",
                "txt_in.individual_token_refiner.blocks.1.self_attn.qkv": (
                    "context_embedder.token_refiner.refiner_blocks.1.attn.to_q"
                ),
                "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            },
        ),
    ],
)
def test_names_without_a_converter_are_those_in_published_files(
    name: str, paths: dict[str, str]
) -> None:
    """PixArt's reference code, and HunyuanVideo as ComfyUI repacks it."""
    namings = FAMILIES[name].layers["transformer"]
    layers = namings.get(COMFY, namings[ORIGINAL])
    for path, module in paths.items():
        assert layers[path].runs[0].module == module


@pytest.mark.parametrize("name", FAMILIES)
def test_every_naming_covers_every_row_of_every_module_once(name: str) -> None:
    family = FAMILIES[name]
    for component, namings in family.layers.items():
        modules = family.components[component]
        for layers in namings.values():
            rows = {path: bytearray(module.shape[0]) for path, module in modules.items()}
            for layer in layers.values():
                begin = 0
                for run in layer.runs:
                    assert run.begin == begin
                    begin += run.rows
                    rows[run.module][run.first : run.first + run.rows] = b"\1" * run.rows
                    assert modules[run.module].shape[1:] == layer.shape[1:]
                assert begin == layer.shape[0]
            assert all(all(module) for module in rows.values())
            assert sum(map(len, rows.values())) == sum(m.shape[0] for m in modules.values())


def test_halves_swapped_twice_are_in_place_again() -> None:
    own = FAMILIES["flux1"].layers["transformer"]["own"]
    layer = pack("flux", ORIGINAL, {"norm_out.linear": own["norm_out.linear"]})
    (swapped,) = layer.values()
    rows = list(range(swapped.shape[0]))
    once = [rows[run.first + n] for run in swapped.runs for n in range(run.rows)]
    twice = [once[run.first + n] for run in swapped.runs for n in range(run.rows)]
    assert once != rows
    assert twice == rows
    assert math.prod(swapped.shape) == math.prod(own["norm_out.linear"].shape)
