"""Names that trainers give to base models, and language models by their widths."""

import pytest

from merge.families import FAMILIES
from merge.families.language import language_models
from merge.families.stated import named_families, statements


@pytest.mark.parametrize("name", FAMILIES)
def test_what_we_write_into_metadata_names_the_family(name: str) -> None:
    family = FAMILIES[name]
    for value in (family.architecture, *family.base_versions):
        assert name in named_families(value)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("sd_v1", ("sd15",)),
        ("SD_1.5", ("sd15",)),
        ("sd_v2_v", ("sd2",)),
        ("sdxl_base_v1-0", ("sdxl",)),
        ("sdxl_1.0", ("sdxl",)),
        ("stable-diffusion-xl-base-1.0", ("sdxl",)),
        ("stable-diffusion-xl-v1-refiner", ("sdxl-refiner",)),
        ("m", ("sd3-medium",)),
        ("5-large", ("sd35-large",)),
        ("stable-diffusion-3.5-medium", ("sd35-medium",)),
        ("stable-diffusion-3", ("sd3-medium", "sd35-medium", "sd35-large")),
        ("flux1", ("flux1",)),
        ("flux.1_kontext", ("flux1",)),
        ("flux-1-schnell", ("flux1",)),
        ("FLUX.1-dev", ("flux1",)),
        ("flux2", ("flux2-dev",)),
        ("flux2_klein_4b", ("flux2-klein-4b",)),
        ("chroma", ("chroma",)),
        ("lumina2", ("lumina2",)),
        ("hunyuan_video", ("hunyuan-video",)),
        ("hunyuan_video_1_5", ("hunyuan-video-1.5",)),
        ("framepack", ("hunyuan-video",)),
        ("wan_2.2_14b", ("wan-14b",)),
        ("wan_2.2_5b", ("wan-5b",)),
        ("qwen_image_edit", ("qwen-image",)),
        ("zimage", ("z-image",)),
        ("Z-Image-Turbo", ("z-image",)),
        ("hidream_i1", ("hidream",)),
        ("medium", ()),
        ("", ()),
        ("my own model", ()),
    ],
)
def test_values_seen_in_files_name_their_families(value: str, names: tuple[str, ...]) -> None:
    assert named_families(value) == names


def test_a_statement_keeps_its_source() -> None:
    found = statements(
        {"modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "unheard of"},
        {"base_model_name_or_path": "Qwen/Qwen-Image-Edit"},
    )
    assert [(said.source, said.families) for said in found] == [
        ("modelspec.architecture", ("flux1",)),
        ("base_model_name_or_path", ("qwen-image",)),
    ]


@pytest.mark.parametrize(
    ("extents", "models"),
    [
        (
            {"layers_0_self_attn_k_proj": (1024, 4096), "layers_0_mlp_down_proj": (4096, 14336)},
            ("Llama 3 8B", "Mistral 7B"),
        ),
        ({"layers_0_mlp_up_proj": (18944, 3584)}, ("Qwen2.5 7B",)),
        ({"layers_0_self_attn_q_proj": (4096, 4096)}, ()),
        ({"layers_0_mlp_up_proj": (1, 3584)}, ()),
        ({"layers_0_mlp_up_proj": (18944, 3584), "layers_1_mlp_up_proj": (4, 3584)}, ()),
    ],
)
def test_widths_name_the_models_that_have_them(
    extents: dict[str, tuple[int, int]], models: tuple[str, ...]
) -> None:
    assert language_models(extents) == models
