"""Generated tables against the model classes and the published counts."""

import json
import re
from math import prod
from pathlib import Path

import pytest

from merge.families import FAMILIES, Family, candidates
from merge.families.generate import as_text, sources, table
from merge.families.layers import ORIGINAL, OWN
from merge.families.tables import DATA, as_tree, expand
from tests.fixtures.families import tiny_family


def test_every_table_has_a_source_and_every_source_a_family() -> None:
    models = {str(m) for family in FAMILIES.values() for m in family.models.values()}
    assert {file.stem for file in DATA.glob("*.json")} == set(sources()) == models


@pytest.mark.parametrize("model", sources())
def test_the_committed_tables_are_what_the_model_classes_say(model: str) -> None:
    generated = as_text(table(sources()[model]))
    committed = (DATA / f"{model}.json").read_text("utf-8")
    assert committed == generated, f"{model} is stale: python -m merge.families.generate"


def test_every_family_has_its_row_in_the_documents() -> None:
    text = (Path(__file__).parents[3] / "docs" / "formats" / "families.md").read_text("utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    found = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in FAMILIES}
    assert list(found) == list(FAMILIES)
    for name, (title, denoiser, n_layers, *_) in found.items():
        family = FAMILIES[name]
        modules = family.components[family.denoiser].values()
        n = sum(module.takes_adapters for module in modules)
        assert (title, denoiser, n_layers) == (family.title, family.denoiser, str(n))


def test_folding_a_table_loses_neither_layers_nor_their_order() -> None:
    """Neighbours that differ, and numbers that do not follow each other, stay apart."""
    layer, other = ["linear", [4, 4], True], ["linear", [4, 4], False]
    paths = [
        "b.0.x",
        "b.0.y",
        "b.1.x",
        "b.1.y",
        "b.3.x",
        "b.3.y",
        "b.4.y",
        "b.4.x",
        "b.5.a.0",
        "b.5.a.1",
    ]
    leaves = {path: layer for path in paths} | {"b.6.a.0": layer, "b.6.a.1": other, "c": other}
    tree = as_tree(leaves)
    assert list(tree["b"]) == ["0..1", "3", "4", "5", "6"]
    assert list(expand(tree)) == list(leaves.items())


@pytest.mark.parametrize("file", sorted(DATA.glob("*.json")), ids=lambda file: file.stem)
def test_the_tables_are_plain_json(file: Path) -> None:
    data = json.loads(file.read_text("utf-8"))
    assert set(data) == {"namings", "modules"}
    for _, (kind, shape, has_bias) in expand(data["modules"]):
        assert kind in ("linear", "conv", "norm", "embedding", "parameter")
        assert all(isinstance(n, int) and n > 0 for n in shape)
        assert isinstance(has_bias, bool)


# Layers of the denoiser that are linear, and convolutions: those of the published models.
LAYERS = {
    "sd15": (184, 98),
    "sd2": (216, 66),
    "sdxl": (743, 51),
    "flux1": (504, 0),
    "sd3-medium": (340, 1),
    "pixart": (290, 1),
    "auraflow": (326, 0),
    "hunyuan-video": (547, 1),
    "wan-14b": (406, 1),
    "wan-1.3b": (306, 1),
    "wan-i2v-14b": (488, 1),
    "qwen-image": (846, 0),
    "z-image": (276, 0),
    "lumina2": (244, 0),
    "chroma": (433, 0),
    "flux2-dev": (203, 0),
    "sana": (166, 61),
    "ltx-2b": (287, 0),
    "cogvideox-2b": (245, 1),
    "mochi": (677, 1),
}


@pytest.mark.parametrize(("name", "counts"), LAYERS.items())
def test_the_layers_are_counted_like_those_of_the_published_models(
    name: str, counts: tuple[int, int]
) -> None:
    family = FAMILIES[name]
    kinds = [module.kind for module in family.components[family.denoiser].values()]
    assert (kinds.count("linear"), kinds.count("conv")) == counts


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("sd15", 859_520_964),
        ("sdxl", 2_567_463_684),
        ("flux1", 11_901_408_320),
        ("sd35-large", 8_056_627_520),
        ("wan-1.3b", 1_418_996_800),
        ("qwen-image", 20_430_401_088),
    ],
)
def test_the_denoisers_have_the_published_number_of_parameters(name: str, n: int) -> None:
    family = FAMILIES[name]
    total = 0
    for module in family.components[family.denoiser].values():
        total += prod(module.shape) + (module.shape[0] if module.has_bias else 0)
    assert total == n


def _unet_counts(family: Family) -> tuple[int, int, int]:
    """Modules an adapter may have: in attention blocks, plus in resnets and samplers, in all."""
    paths = [p for p, m in family.components["unet"].items() if m.takes_adapters]
    attention = sum(".attentions." in p for p in paths)
    blocks = sum(any(part in p for part in (".resnets.", "samplers.")) for p in paths)
    return attention, attention + blocks, len(paths)


@pytest.mark.parametrize(
    ("name", "counts"),
    [("sd15", (192, 278, 282)), ("sd2", (192, 278, 282)), ("sdxl", (722, 788, 794))],
)
def test_adapters_of_unets_have_the_modules_that_kohya_s_trainer_counts(
    name: str, counts: tuple[int, int, int]
) -> None:
    assert _unet_counts(FAMILIES[name]) == counts


@pytest.mark.parametrize(("name", "counts"), [("sd15", (192, 278, 282)), ("sdxl", (722, 788, 794))])
def test_the_tiny_unets_of_the_tests_have_all_modules_of_the_real_ones(
    name: str, counts: tuple[int, int, int]
) -> None:
    assert _unet_counts(tiny_family(f"{name}-tiny")) == counts


@pytest.mark.parametrize(("name", "n"), [("sd15", 128), ("sdxl", 560)])
def test_the_default_targets_of_diffusers_example_are_counted(name: str, n: int) -> None:
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    assert sum(path.endswith(ends) for path in FAMILIES[name].components["unet"]) == n


@pytest.mark.parametrize(
    ("name", "component", "n"),
    [
        ("sd15", "text_encoder", 72),
        ("sd2", "text_encoder", 138),
        ("sdxl", "text_encoder", 72),
        ("sdxl", "text_encoder_2", 192),
        ("flux1", "text_encoder", 72),
        ("flux1", "text_encoder_2", 168),
        ("sd3-medium", "text_encoder_3", 168),
    ],
)
def test_text_encoders_have_the_modules_that_adapters_have(
    name: str, component: str, n: int
) -> None:
    modules = FAMILIES[name].components[component]
    in_layers = (".layers.", ".layer.")
    found = [p for p, m in modules.items() if m.takes_adapters and any(w in p for w in in_layers)]
    assert len(found) == n


@pytest.mark.parametrize(
    ("name", "naming", "n"),
    [
        ("flux1", ORIGINAL, 19 * 10 + 38 * 3),
        ("flux1", OWN, 19 * 14 + 38 * 6),
        ("sd3-medium", OWN, 333),
    ],
)
def test_adapters_of_transformer_blocks_are_counted_packed_and_split(
    name: str, naming: str, n: int
) -> None:
    layers = FAMILIES[name].layers["transformer"][naming].values()
    assert sum(layer.kind == "linear" and "blocks." in layer.path for layer in layers) == n


UNETS = {"sd15", "sd2", "sdxl", "sdxl-refiner", "tiny-sd"}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["down_blocks_0_attentions_0_proj_in"], UNETS),
        (["input_blocks_4_1_proj_in", "time_embed_0"], UNETS),
        (["joint_blocks_3_x_block_attn_qkv"], {"sd3-medium", "sd35-medium", "sd35-large"}),
        (["transformer_blocks_3_img_mod_1"], {"qwen-image"}),
        (["layers.0.attention.qkv"], {"z-image", "lumina2"}),
        (["all_x_embedder.2-1"], {"z-image"}),
        (["head_head", "head_modulation"], {"wan-14b", "wan-i2v-14b", "wan-1.3b", "wan-5b"}),
        (["model.layers.0.self_attn.q_proj"], set()),
        ([], set()),
    ],
)
def test_candidates_are_told_by_the_beginnings_of_paths(paths: list[str], names: set[str]) -> None:
    found = candidates((path, "." not in path) for path in paths)
    assert {family.name for family in found} == names


def test_candidates_name_all_paths_if_any_family_does() -> None:
    """A text encoder beside a UNet: every family with a CLIP names some, those are not meant."""
    unet, text = ("input_blocks_4_1_proj_in", True), ("text_model_encoder_layers_0_mlp_fc1", True)
    other = ("other_blocks_0_attn", True)
    assert {family.name for family in candidates([unet, text, text])} == UNETS
    assert {family.name for family in candidates([unet, unet, text, other])} == UNETS
    assert "flux1" in {family.name for family in candidates([unet, text, text, other])}
    assert candidates([other]) == ()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_a_candidate_for_each_of_its_paths(name: str) -> None:
    family = FAMILIES[name]
    for namings in family.layers.values():
        for layers in namings.values():
            for path in {re.sub(r"\d+", "0", path): path for path in layers}.values():
                for spelled, is_flat in ((path, False), (path.replace(".", "_"), True)):
                    assert family in candidates([(spelled, is_flat)]), path
