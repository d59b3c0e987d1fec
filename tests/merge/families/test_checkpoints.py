"""Which family a checkpoint is of, in which layout, from names and shapes alone."""

import pytest

from merge.errors import BadCheckpoint
from merge.families import FAMILIES, Place
from merge.families.checkpoints import Component, read_checkpoint
from merge.families.layers import ORIGINAL, OWN, parameter_key
from merge.families.sources import COMFY
from merge.formats.header import Header, TensorInfo

Shapes = dict[str, tuple[int, ...]]


def _header(shapes: Shapes) -> Header:
    tensors = {key: TensorInfo("F16", shape, 0, 0) for key, shape in shapes.items()}
    return Header(tensors, {}, 8, 8)


def _shapes(name: str, component: str, prefix: str, naming: str) -> Shapes:
    held = Component(component, prefix, naming)
    return {key: layer.shape for key, layer in held.tensors(FAMILIES[name])}


def _own(name: str, component: str, prefix: str = "") -> Shapes:
    modules = FAMILIES[name].components[component]
    return {prefix + parameter_key(p, m.kind, "weight"): m.shape for p, m in modules.items()}


LDM = "model.diffusion_model."
COMFY_TEXT = "text_encoders.{}.transformer."
# family -> what one of its published single files holds: (component, prefix, naming).
SINGLE_FILES = {
    "sd15": [
        ("unet", LDM, ORIGINAL),
        ("text_encoder", "cond_stage_model.transformer.", OWN),
    ],
    "sd15 of the NovelAI era": [
        ("unet", LDM, ORIGINAL),
        ("text_encoder", "cond_stage_model.transformer.", "flat_text"),
    ],
    "sd2": [("unet", LDM, ORIGINAL), ("text_encoder", "cond_stage_model.model.", "openclip")],
    "sdxl": [
        ("unet", LDM, ORIGINAL),
        ("text_encoder", "conditioner.embedders.0.transformer.", OWN),
        ("text_encoder_2", "conditioner.embedders.1.model.", "openclip"),
    ],
    "sdxl-refiner": [
        ("unet", LDM, ORIGINAL),
        ("text_encoder_2", "conditioner.embedders.0.model.", "openclip"),
    ],
    "sd3-medium": [
        ("transformer", LDM, ORIGINAL),
        ("text_encoder", COMFY_TEXT.format("clip_l"), OWN),
        ("text_encoder_2", COMFY_TEXT.format("clip_g"), OWN),
        ("text_encoder_3", COMFY_TEXT.format("t5xxl"), OWN),
    ],
    "sd35-medium": [("transformer", LDM, ORIGINAL)],
    "sd35-large": [("transformer", LDM, ORIGINAL)],
    "flux1": [("transformer", "", ORIGINAL)],
    "flux1 all in one": [
        ("transformer", LDM, ORIGINAL),
        ("text_encoder", COMFY_TEXT.format("clip_l"), OWN),
        ("text_encoder_2", COMFY_TEXT.format("t5xxl"), OWN),
    ],
    "chroma": [("transformer", "", ORIGINAL)],
    "pixart": [("transformer", "", ORIGINAL)],
    "lumina2": [("transformer", LDM, ORIGINAL)],
    "wan-14b": [("transformer", "", ORIGINAL)],
    "wan-14b repacked": [("transformer", "diffusion_model.", ORIGINAL)],
    "wan-i2v-14b": [("transformer", LDM, ORIGINAL)],
    "wan-1.3b": [("transformer", "", ORIGINAL)],
    "wan-5b": [("transformer", "", ORIGINAL)],
    "hunyuan-video": [("transformer", "", ORIGINAL)],
    "hunyuan-video for ComfyUI": [("transformer", LDM, COMFY)],
    "z-image": [("transformer", "", ORIGINAL)],
    "z-image repacked": [("transformer", LDM, ORIGINAL)],
    "qwen-image repacked": [("transformer", LDM, OWN)],
    "auraflow": [("transformer", LDM, ORIGINAL)],
    "flux2-dev": [("transformer", "", ORIGINAL)],
    "flux2-klein-4b": [("transformer", "", ORIGINAL)],
    "flux2-klein-9b": [("transformer", "", ORIGINAL)],
    "sana": [("transformer", "", ORIGINAL)],
    "ltx-2b": [("transformer", LDM, ORIGINAL)],
    "ltx-13b": [("transformer", LDM, ORIGINAL)],
    "mochi": [("transformer", "", ORIGINAL)],
}


@pytest.mark.parametrize("file", SINGLE_FILES)
def test_a_single_file_is_of_one_family_and_holds_what_it_holds(file: str) -> None:
    name = file.partition(" ")[0]
    family = FAMILIES[name]
    shapes: Shapes = {"vae.decoder.conv_out.weight": (3, 128, 3, 3)}
    for component, prefix, naming in SINGLE_FILES[file]:
        shapes |= _shapes(name, component, prefix, naming)
    found = read_checkpoint(_header(shapes), "f")
    assert [other.name for other in found.families] == [name]
    assert found.layout == ("ldm" if family.denoiser == "unet" else "original")
    assert list(found.components.values()) == [Component(*each) for each in SINGLE_FILES[file]]
    for component in found.components:
        for module in family.components[component]:
            places = found.places(component, module)
            assert places or ".scale" in module or "norm" in module
            for place in places:
                rows = shapes[place.key][0]
                assert place.rows is None or place.rows[1] <= rows


@pytest.mark.parametrize("name", FAMILIES)
def test_the_denoiser_s_file_of_a_folder_is_told_apart_from_single_files(name: str) -> None:
    denoiser = FAMILIES[name].denoiser
    found = read_checkpoint(_header(_own(name, denoiser)), "f")
    assert found.families[0].name == name
    assert (found.layout, set(found.components)) == ("diffusers", {denoiser})
    first = next(path for path, m in found.family.components[denoiser].items() if m.takes_adapters)
    assert found.places(denoiser, first) == (Place(f"{first}.weight"),)
    assert found.places(denoiser, first, "bias") == (), "this header has no bias"
    assert found.places("text_encoder", "text_model.encoder.layers.0.mlp.fc1") == ()
    assert found.places(denoiser, "no.such.module") == ()


def test_both_experts_of_a_folder_are_held_apart() -> None:
    shapes = _own("wan-14b", "transformer", "transformer.")
    shapes |= _own("wan-14b", "transformer_2", "transformer_2.")
    found = read_checkpoint(_header(shapes), "f")
    (place,) = found.places("transformer_2", "blocks.3.attn1.to_q")
    assert place.key == "transformer_2.blocks.3.attn1.to_q.weight"


def test_a_packed_layer_has_a_place_for_the_rows_of_each_module() -> None:
    found = read_checkpoint(_header(_shapes("flux1", "transformer", "", ORIGINAL)), "f")
    qkv = "double_blocks.0.img_attn.qkv.weight"
    assert found.places("transformer", "transformer_blocks.0.attn.to_v") == (
        Place(qkv, (6144, 9216)),
    )
    final = "final_layer.adaLN_modulation.1.weight"
    assert found.places("transformer", "norm_out.linear") == (
        Place(final, (3072, 6144), first=0),
        Place(final, (0, 3072), first=3072),
    )
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    assert found.places("transformer", "transformer_blocks.0.attn.norm_q") == (Place(norm),)


def test_openclip_s_projections_are_rows_of_one_tensor() -> None:
    shapes = _shapes("sd2", "text_encoder", "cond_stage_model.model.", "openclip")
    shapes |= _shapes("sd2", "unet", LDM, ORIGINAL)
    found = read_checkpoint(_header(shapes), "f")
    layer = "text_model.encoder.layers.5.self_attn"
    key = "cond_stage_model.model.transformer.resblocks.5.attn.in_proj_weight"
    assert found.places("text_encoder", f"{layer}.k_proj") == (Place(key, (1024, 2048)),)


VARIANTS = [
    ("sd15", LDM + "input_blocks.0.0.weight", (320, 9, 3, 3)),
    ("flux1", "img_in.weight", (3072, 384)),
    ("flux1", "guidance_in.in_layer.weight", None),
    ("wan-14b", "patch_embedding.weight", (5120, 36, 1, 2, 2)),
    ("pixart", "csize_embedder.mlp.0.weight", None),
]


@pytest.mark.parametrize(("name", "key", "shape"), VARIANTS)
def test_a_variant_is_of_its_family(name: str, key: str, shape: tuple[int, ...] | None) -> None:
    """Inpainting, Fill, schnell, image-to-video of Wan 2.2, PixArt Sigma."""
    component, prefix, naming = SINGLE_FILES[name][0]
    shapes = _shapes(name, component, prefix, naming)
    assert key in shapes
    if shape is None:
        family = key.partition(".")[0]
        shapes = {k: v for k, v in shapes.items() if not k.startswith(family)}
    else:
        shapes[key] = shape
    assert read_checkpoint(_header(shapes), "f").family.name == name


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("sd15", LDM + "middle_block.1.proj_in.weight", (1280, 1280)),
        ("sd15", LDM + "input_blocks.0.0.weight", (320, 6, 3, 3)),
        ("sd15", LDM + "out.2.weight", None),
        ("flux1", "double_blocks.18.img_attn.qkv.weight", None),
        ("flux1", "double_blocks.18.img_attn.qkv.weight", (3072, 3072)),
        ("flux1", "img_in.weight", (3072, 65)),
    ],
)
def test_one_wrong_shape_or_missing_key_is_another_model(
    name: str, key: str, shape: tuple[int, ...] | None
) -> None:
    shapes = _shapes(name, *SINGLE_FILES[name][0])
    assert key in shapes
    if shape is None:
        del shapes[key]
    else:
        shapes[key] = shape
    with pytest.raises(BadCheckpoint, match="f: its keys and shapes are not those of any family"):
        read_checkpoint(_header(shapes), "f")


@pytest.mark.parametrize(
    ("family", "component", "names"),
    [
        (
            "sd15",
            "text_encoder",
            ["sd15", "sdxl", "flux1", "sd3-medium", "sd35-medium", "sd35-large"],
        ),
        ("sdxl", "text_encoder_2", ["sdxl", "sdxl-refiner", "sd3-medium", "sd35-medium", "sd35-large"]),
        ("sd2", "text_encoder", ["sd2"]),
        (
            "flux1",
            "text_encoder_2",
            ["flux1", "chroma", "sd3-medium", "sd35-medium", "sd35-large", "pixart"],
        ),
    ],
)  # fmt: skip
def test_an_encoder_alone_fits_every_family_that_has_it(
    family: str, component: str, names: list[str]
) -> None:
    for strip in ("", "text_model."):
        own = _own(family, component)
        shapes = {key.removeprefix(strip): shape for key, shape in own.items()}
        assert [f.name for f in read_checkpoint(_header(shapes), "f").families] == names
