"""A path in any naming, dotted or flattened, leads to its layer."""

import pytest

from merge.families import FAMILIES
from merge.families.family import DENOISER
from merge.families.layers import ORIGINAL
from tests.fixtures.families import registered, tiny_flux


@pytest.mark.parametrize("name", FAMILIES)
def test_every_path_of_every_naming_leads_back_to_its_layer_dotted_and_flattened(
    name: str,
) -> None:
    """So no two names of a component flatten alike."""
    family = FAMILIES[name]
    for component, namings in family.layers.items():
        for layers in namings.values():
            for path, layer in layers.items():
                for spelled in {path, path.removeprefix("text_model.")}:
                    for is_flat in (False, True):
                        asked = spelled.replace(".", "_") if is_flat else spelled
                        found = family.find(component, asked, is_flat=is_flat, extent=layer.extent)
                        assert found is not None
                        assert (found[0], found[1].runs) == (component, layer.runs)


def _module(name: str, component: str | None, flat: str) -> tuple[str, str | None] | None:
    found = FAMILIES[name].find(component, flat, is_flat=True)
    return None if found is None else (found[0], found[1].module)


@pytest.mark.parametrize(
    ("name", "flat", "module"),
    [
        (
            "sdxl",
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("sdxl", "output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("sdxl", "input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("sdxl", "middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
        ("sdxl", "label_emb_0_2", "add_embedding.linear_2"),
        ("sdxl", "output_blocks_8_0_skip_connection", "up_blocks.2.resnets.2.conv_shortcut"),
        ("flux1", "single_blocks_0_linear2", "single_transformer_blocks.0.proj_out"),
        ("flux1", "double_blocks_18_img_mod_lin", "transformer_blocks.18.norm1.linear"),
        ("flux1", "final_layer_linear", "proj_out"),
        ("sd3-medium", "joint_blocks_5_x_block_mlp_fc1", "transformer_blocks.5.ff.net.0.proj"),
        ("wan-14b", "blocks_39_cross_attn_o", "blocks.39.attn2.to_out.0"),
        ("wan-14b", "blocks_0_ffn_2", "blocks.0.ffn.net.2"),
        ("hunyuan-video", "double_blocks_0_img_mlp_fc1", "transformer_blocks.0.ff.net.0.proj"),
        ("z-image", "layers_29_attention_out", "layers.29.attention.to_out.0"),
        ("z-image", "final_layer_linear", "all_final_layer.2-1.linear"),
        ("lumina2", "layers_3_adaLN_modulation_1", "layers.3.norm1.linear"),
        ("qwen-image", "transformer_blocks_59_img_mod_1", "transformer_blocks.59.img_mod.1"),
    ],
)
def test_names_in_published_adapters_lead_to_their_module(
    name: str, flat: str, module: str
) -> None:
    denoiser = FAMILIES[name].denoiser
    assert _module(name, DENOISER, flat) == (denoiser, module)


def test_a_packed_name_leads_to_several_modules() -> None:
    found = FAMILIES["flux1"].find(DENOISER, "double_blocks_0_img_attn_qkv", is_flat=True)
    assert found is not None
    assert found[1].naming == ORIGINAL
    assert found[1].module is None
    assert [run.module.rpartition(".")[2] for run in found[1].runs] == ["to_q", "to_k", "to_v"]


def test_the_encoders_of_flux_are_told_by_their_paths() -> None:
    """T5 is te3 to one trainer and te2 to another; a CLIP is never it."""
    t5 = "encoder_block_3_layer_0_SelfAttention_q"
    for named in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert _module("flux1", named, t5) == (
            "text_encoder_2",
            "encoder.block.3.layer.0.SelfAttention.q",
        )
    assert _module("flux1", "unet", t5) is None


@pytest.mark.parametrize("named", ["text_encoder", "text_encoder_2", "text_encoder_3", None])
@pytest.mark.parametrize(
    ("extent", "expected"), [((3072, 768), "text_encoder"), ((5120, 1280), "text_encoder_2")]
)
def test_the_delta_decides_between_text_encoders_that_share_names(
    named: str | None, extent: tuple[int, int], expected: str
) -> None:
    found = FAMILIES["sdxl"].find(named, "encoder_layers_0_mlp_fc1", is_flat=True, extent=extent)
    assert found is not None
    assert found[0] == expected


def test_a_dotted_name_of_an_encoder_is_meant() -> None:
    path = "text_model.encoder.layers.0.mlp.fc1"
    found = FAMILIES["sdxl"].find("text_encoder", path, is_flat=False, extent=(5120, 1280))
    assert found is not None
    assert found[0] == "text_encoder"


@pytest.mark.parametrize(
    ("name", "path", "shape", "other"),
    [
        ("sd15", "conv_in", (320, 9, 3, 3), (320, 5, 3, 3)),
        ("flux1", "img_in", (3072, 384), (3072, 100)),
        ("wan-14b", "patch_embedding", (5120, 36, 1, 2, 2), (5120, 17, 1, 2, 2)),
    ],
)
def test_a_wider_input_is_found_where_variants_have_one(
    name: str, path: str, shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    for wanted, is_known in ((shape, True), (other, False)):
        out, *rest = wanted
        columns = 1
        for n in rest:
            columns *= n
        found = FAMILIES[name].find(DENOISER, path, is_flat=False, extent=(out, columns))
        assert found is not None
        assert (found[1].shape == wanted) is is_known


def test_a_family_of_a_test_is_known_inside_the_test_alone() -> None:
    family = tiny_flux().family
    with registered(family):
        assert FAMILIES[family.name] is family
    assert family.name not in FAMILIES
