"""Any valid safetensors file gets an answer; kinds, algorithms, families and doubts are right."""

import hashlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from merge.errors import BadFile
from merge.families import FAMILIES
from merge.formats.grammar import ALGORITHMS
from merge.formats.suffixes import SUFFIXES
from merge.formats.writer import layout, write_file
from merge.identify import Identification, identify
from tests.fixtures.adapters import DIALECTS, make_adapter
from tests.fixtures.families import original_path, single_file_place
from tests.fixtures.malformed import ODD

Shapes = dict[str, tuple[int, ...]]


def _file_of(shapes: Shapes, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A sparse file with these tensors, all zero: identification needs no data but alphas."""
    placed = layout([(key, "F16", shape) for key, shape in shapes.items()], metadata or {})
    path.write_bytes(placed.head)
    os.truncate(path, placed.file_size)
    return path


def _identify(shapes: Shapes, tmp_path: Path, **metadata: str) -> Identification:
    return identify(_file_of(shapes, tmp_path / "f.safetensors", metadata), hashes=False)


def _codes(found: Identification) -> list[str]:
    return [warning.code for warning in found.warnings]


def test_the_whole_answer_about_one_adapter(tmp_path: Path) -> None:
    path = tmp_path / "zorb.safetensors"
    write_file(
        path,
        {
            "lora_unet_mid_block_attentions_0_proj_in.alpha": np.array(2, np.float32),
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": np.ones(
                (4, 96, 1, 1), np.float16
            ),
            "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": np.ones(
                (96, 4, 1, 1), np.float16
            ),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": np.ones(
                (1, 64), np.float16
            ),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": np.ones(
                (128, 1), np.float16
            ),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": np.array(1, np.float32),
        },
        {"modelspec.trigger_phrase": "zorb"},
    )
    data = path.read_bytes()
    assert identify(path).to_json() == {
        "kind": "adapter",
        "algorithms": ["lora"],
        "dialect": "kohya",
        "families": [
            {
                "name": "tiny-sd",
                "confidence": 0.99,
                "why": "all 2 modules have its names and shapes",
            }
        ],
        "modules": 2,
        "components": {"text_encoder": 1, "unet": 1},
        "ranks": {"min": 1, "max": 4},
        "alphas": {"min": 1.0, "max": 2.0},
        "targets": ["mlp.fc1", "proj_in"],
        "dtypes": {"F16": 4, "F32": 2},
        "parameters": 4 * 96 * 2 + 64 + 128 + 2,
        "size_bytes": path.stat().st_size,
        "hashes": {
            "sha256": hashlib.sha256(data).hexdigest(),
            "autov1": None,
            "autov2": hashlib.sha256(data).hexdigest()[:10],
            "autov3": hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()[
                :12
            ],
            "blake3": blake3(data).hexdigest(),
            "crc32": f"{zlib.crc32(data):08x}",
        },
        "trigger_words": ["zorb"],
        "metadata": {"modelspec.trigger_phrase": "zorb"},
        "warnings": [],
    }


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_named_with_its_family(dialect: str, tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "adapter_model.safetensors", dialect=dialect, alphas=2.0)
    found = identify(made.path, hashes=False, config=made.config)
    named = "diffusers_old" if dialect == "processors" else dialect
    assert (found.kind, found.dialect, found.algorithms) == ("adapter", named, ("lora",))
    assert [f.name for f in found.families] == ["tiny-sd"]
    assert found.components == {"unet": len(made.deltas)}
    assert found.targets == tuple(
        sorted(f"attn{n}.{to}" for n in (1, 2) for to in ("to_k", "to_out.0", "to_q", "to_v"))
    )
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("dialect", "alphas"), [("kohya", (2, 8)), ("peft", (2, 8)), ("diffusers", (2, 8))]
)
def test_alphas_and_ranks_are_spans(
    dialect: str, alphas: tuple[float, float], tmp_path: Path
) -> None:
    made = make_adapter(
        tmp_path / "adapter_model.safetensors",
        dialect=dialect,
        ranks=[4, 1, 16],
        alphas=[2.0, 8.0],
    )
    found = identify(made.path, hashes=False, config=made.config)
    assert found.ranks is not None
    assert (found.ranks.min, found.ranks.max) == (1, 16)
    assert found.alphas is not None
    assert (found.alphas.min, found.alphas.max) == alphas


def _full_size(family: str, component: str = "unet", rank: int = 8) -> Shapes:
    shapes: Shapes = {}
    table = FAMILIES[family]
    for path, module in table.components[component].items():
        if not module.takes_adapters:
            continue
        named = original_path(table, component, path) if component in table.kohya_naming else path
        stem = f"{table.kohya[component][0]}_{named.replace('.', '_')}"
        shapes[f"{stem}.lora_down.weight"] = (rank, *module.shape[1:])
        shapes[f"{stem}.lora_up.weight"] = (module.shape[0], rank, *[1] * len(module.kernel))
        shapes[f"{stem}.alpha"] = ()
    return shapes


def test_a_full_size_sdxl_adapter_is_told_from_its_header(tmp_path: Path) -> None:
    components = ("unet", "text_encoder", "text_encoder_2")
    shapes = {k: v for c in components for k, v in _full_size("sdxl", c).items()}
    found = _identify(shapes, tmp_path)
    assert found.components == {"unet": 794, "text_encoder_2": 193, "text_encoder": 72}
    assert [(f.name, f.confidence) for f in found.families] == [("sdxl", 0.99)]
    assert _codes(found) == ["alpha_zero"]  # the file is all zeros


def test_a_family_that_fits_in_part_is_named_with_doubt(tmp_path: Path) -> None:
    shapes = _full_size("sd15")
    for n in range(100):
        shapes |= {f"lora_unet_new_{n}.lora_down.weight": (4, 8)}
        shapes |= {f"lora_unet_new_{n}.lora_up.weight": (8, 4)}
    found = _identify(shapes, tmp_path)
    assert [(f.name, f.confidence) for f in found.families] == [("sd15", 0.59)]
    assert "unknown_modules" in _codes(found)


def test_families_that_fit_alike_share_the_confidence_unless_metadata_decides(
    tmp_path: Path,
) -> None:
    layer = _lora("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768)
    found = _identify(layer, tmp_path)
    assert [(f.name, f.confidence) for f in found.families[:2]] == [("sd15", 0.5), ("sdxl", 0.5)]
    found = _identify(layer, tmp_path, ss_base_model_version="sdxl_base_v1-0")
    assert [(f.name, f.confidence) for f in found.families[:2]] == [("sdxl", 0.9), ("sd15", 0.5)]
    assert found.families[0].why.endswith("; ss_base_model_version says sdxl_base_v1-0")


def _lora(path: str, n_in: int, n_out: int) -> Shapes:
    return {f"{path}.lora_down.weight": (4, n_in), f"{path}.lora_up.weight": (n_out, 4)}


QKV = "double_blocks_0_img_attn_qkv"
WIDE = (3072, 9216)
# What a file trains, and all families that have such layers, likeliest first.
FEW_LAYERS: list[tuple[list[str], Shapes]] = [
    # Chroma is FLUX.1 without modulation; the others are as wide. Blocks tell them apart.
    (["flux1", "chroma", "hunyuan-video", "flux2-klein-4b"], _lora(f"lora_unet_{QKV}", *WIDE)),
    (
        ["flux1", "chroma", "hunyuan-video"],
        _lora(f"lora_unet_{QKV}", *WIDE) | _lora("lora_unet_single_blocks_37_linear2", 15360, 3072),
    ),
    # ComfyUI spells HunyuanVideo as FLUX.1 is spelled.
    (
        ["flux1", "hunyuan-video"],
        _lora("diffusion_model.double_blocks.0.img_mod.lin", 3072, 18432),
    ),
    (
        ["flux1"],
        _lora("diffusion_model.double_blocks.0.img_mod.lin", 3072, 18432)
        | _lora("diffusion_model.img_in", 64, 3072),
    ),
    (["flux1"], _lora("transformer.x_embedder", 384, 3072)),
    (["chroma"], _lora("diffusion_model.distilled_guidance_layer.in_proj", 64, 5120)),
    (["hunyuan-video"], _lora("lora_unet_double_blocks_0_img_mlp_fc1", 3072, 12288)),
    (["flux2-klein-4b"], _lora("lora_unet_double_blocks_0_img_mlp_0", 3072, 18432)),
    (["flux2-klein-9b"], _lora(f"lora_unet_{QKV}", 4096, 12288)),
    (["flux2-dev"], _lora("transformer.transformer_blocks.0.attn.to_q", 6144, 6144)),
    (
        ["sd3-medium", "sd35-medium"],
        _lora("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536, 4608),
    ),
    (["sd35-medium"], _lora("lora_unet_joint_blocks_12_x_block_attn2_qkv", 1536, 4608)),
    (["sd35-large"], _lora("transformer.transformer_blocks.0.attn.to_q", 2432, 2432)),
    (["qwen-image"], _lora("transformer.transformer_blocks.0.img_mlp.net.0.proj", 3072, 12288)),
    (["wan-14b", "wan-i2v-14b"], _lora("diffusion_model.blocks.0.self_attn.q", 5120, 5120)),
    (["wan-i2v-14b"], _lora("diffusion_model.blocks.0.cross_attn.k_img", 5120, 5120)),
    (["wan-1.3b"], _lora("lora_unet_blocks_29_ffn_0", 1536, 8960)),
    (["wan-5b"], _lora("diffusion_model.blocks.0.self_attn.q", 3072, 3072)),
    (["z-image"], _lora("diffusion_model.layers.0.attention.qkv", 3840, 11520)),
    (["lumina2"], _lora("diffusion_model.layers.0.attention.qkv", 2304, 3840)),
    (["sd2"], _lora("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 1024, 1280)),
    (["sd15"], _lora("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 768, 1280)),
    (
        ["sdxl-refiner"],
        _lora("lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k", 1280, 1536),
    ),
    (["pixart"], _lora("transformer.transformer_blocks.0.attn1.to_q", 1152, 1152)),
]  # fmt: skip


@pytest.mark.parametrize(("names", "shapes"), FEW_LAYERS)
def test_a_few_layers_leave_all_families_that_have_them(
    names: list[str], shapes: Shapes, tmp_path: Path
) -> None:
    found = _identify(shapes, tmp_path)
    assert [f.name for f in found.families] == names
    assert {f.confidence for f in found.families} == {0.99 if len(names) == 1 else 0.5}


OUTSIDE: list[tuple[str, Shapes]] = [
    (
        "flux2",
        _lora("transformer.transformer_blocks.0.attn.to_q", 6144, 6144)
        | _lora("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 6144, 9216),
    ),
    ("anima", _lora("diffusion_model.blocks.0.self_attn.q_proj", 2048, 2048)),
    ("llm", _lora("base_model.model.model.layers.0.self_attn.q_proj", 4096, 4096)),
]


@pytest.mark.parametrize(("name", "shapes"), OUTSIDE)
def test_families_without_a_table_are_recognised_and_never_claimed(
    name: str, shapes: Shapes, tmp_path: Path
) -> None:
    found = _identify(shapes, tmp_path)
    assert [(f.name, f.confidence) for f in found.families] == [(name, 0.6)]
    assert found.algorithms == ("lora",)
    assert _codes(found)[0] in {"unknown_modules", "shape_mismatch", "open_family", "unsupported"}


def test_several_families_name_each_other(tmp_path: Path) -> None:
    found = _identify(_lora("diffusion_model.blocks.0.self_attn.q", 5120, 5120), tmp_path)
    assert [f.why for f in found.families] == [
        (
            "its only module has its names and shapes, and those of Wan 2.1 image-to-video 14B; "
            "2.1 and both experts of 2.2 have the same"
        ),
        "its only module has its names and shapes, and those of Wan 14B",
    ]


def test_words_about_a_file_that_fits_no_table_are_hints_with_their_source(tmp_path: Path) -> None:
    wan = _lora("diffusion_model.blocks.0.self_attn.q", 999, 999)
    found = _identify(wan, tmp_path, ss_base_model_version="wan_2.2_5b")
    assert [(f.name, f.confidence) for f in found.families] == [("wan-5b", 0.8)]
    assert found.families[0].why == (
        "its module names look like Wan; ss_base_model_version says wan_2.2_5b"
    )
    found = _identify(
        wan, tmp_path, ss_base_model_version="wan", **{"modelspec.architecture": "chroma/lora"}
    )
    assert [(f.name, f.confidence) for f in found.families] == [
        *((name, 0.8) for name in ("wan-14b", "wan-i2v-14b", "wan-1.3b", "wan-5b")),
        ("chroma", 0.4),
    ]
    unknown = _lora("diffusion_model.what.0.q", 64, 64)
    found = _identify(unknown, tmp_path, ss_base_model_version="krea2")
    assert [(f.name, f.confidence, f.why) for f in found.families] == [
        ("krea2", 0.4, "ss_base_model_version says krea2")
    ]


def test_a_language_model_is_told_by_widths_and_the_configuration_s_words(tmp_path: Path) -> None:
    layer = "base_model.model.model.layers.0."
    shapes: Shapes = {}
    for path, n_in, n_out in (("self_attn.q_proj", 4096, 4096), ("self_attn.v_proj", 4096, 1024)):
        shapes |= {
            f"{layer}{path}.lora_A.weight": (4, n_in),
            f"{layer}{path}.lora_B.weight": (n_out, 4),
        }
    save_file(
        {k: torch.zeros(v, dtype=torch.float16) for k, v in shapes.items()},
        tmp_path / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "base_model_name_or_path": "acme/Tuned-8B",
    }
    found = identify(tmp_path / "adapter_model.safetensors", hashes=False, config=config)
    assert [(f.name, f.confidence, f.why) for f in found.families] == [
        (
            "llm",
            0.6,
            (
                "its module names look like a Llama-like language model as wide as Llama 3 8B, "
                "Mistral 7B or Qwen3 8B; base_model_name_or_path says acme/Tuned-8B"
            ),
        )
    ]


def test_metadata_agrees_or_is_a_second_guess(tmp_path: Path) -> None:
    shapes = _lora(f"lora_unet_{QKV}", *WIDE)
    for version, first in (
        ("flux1", "flux1"),
        ("chroma", "chroma"),
        ("hunyuan_video", "hunyuan-video"),
    ):
        agreed = _identify(shapes, tmp_path, ss_base_model_version=version)
        assert (agreed.families[0].name, agreed.families[0].confidence) == (first, 0.9)
    conflict = _identify(
        _lora("lora_unet_double_blocks_0_img_mlp_fc1", 3072, 12288),
        tmp_path,
        ss_base_model_version="flux1",
    )
    assert [(f.name, f.confidence, f.why) for f in conflict.families] == [
        (
            "hunyuan-video",
            0.99,
            "its only module has its names and shapes, though ss_base_model_version says flux1",
        )
    ]
    nothing = _identify(_lora("lora_unet_what", 8, 8), tmp_path, ss_base_model_version="new_thing")
    assert nothing.families == ()


MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
OTHERS: list[tuple[str, Shapes, int | None]] = [
    ("loha", {"hada_w1_a": (96, 4), "hada_w1_b": (4, 96), "hada_w2_a": (96, 4), "hada_w2_b": (4, 96)}, 4),
    ("lokr", {"lokr_w1": (8, 8), "lokr_w2_a": (12, 3), "lokr_w2_b": (3, 12)}, 3),
    ("lokr", {"lokr_w1": (8, 8), "lokr_w2": (12, 12)}, None),
    ("dora", {"lora_down.weight": (4, 96), "lora_up.weight": (96, 4), "dora_scale": (96, 1)}, 4),
    ("lora", {"lora_down.weight": (4, 96, 1, 1), "lora_mid.weight": (4, 4, 1, 1),
              "lora_up.weight": (96, 4, 1, 1)}, 4),
    ("oft", {"oft_blocks": (4, 24, 24)}, None),
    ("boft", {"oft_blocks": (2, 4, 24, 24)}, None),
    ("ia3", {"weight": (96,), "on_input": ()}, None),
    ("glora", {"a1.weight": (96, 4), "a2.weight": (4, 96), "b1.weight": (96, 4),
               "b2.weight": (4, 96)}, 4),
    ("full", {"diff": (96, 96), "diff_b": (96,)}, None),
]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "roles", "rank"), OTHERS)
def test_other_algorithms_are_named_and_measured(
    algorithm: str, roles: Shapes, rank: int | None, tmp_path: Path
) -> None:
    shapes = {f"{MODULE}.{role}": shape for role, shape in roles.items()}
    found = _identify(shapes, tmp_path)
    assert (found.kind, found.algorithms, found.modules) == ("adapter", (algorithm,), 1)
    assert (found.ranks and found.ranks.max) == rank
    # Shapes tell the family where the factors say how large the weight is.
    unets = {"tiny-sd", "sd15", "sdxl", "sd2", "sdxl-refiner"}
    names = unets if algorithm == "ia3" else {"tiny-sd"}
    assert {f.name for f in found.families} == names
    assert found.warnings == ()


def test_what_is_recognised_and_not_merged_says_why(tmp_path: Path) -> None:
    roles = {"q_layer.weight": (4, 96), "p_layer.weight": (96, 4), "lambda_layer": (1, 4)}
    found = _identify({f"{MODULE}.{role}": shape for role, shape in roles.items()}, tmp_path)
    assert found.algorithms == ("tlora",)
    (warning,) = found.warnings
    assert warning.code == "unsupported"
    assert "T-LoRA subtracts" in warning.message


def test_a_file_of_several_algorithms_lists_them_by_number(tmp_path: Path) -> None:
    shapes: Shapes = {}
    for n in range(3):
        shapes |= {f"lora_unet_a{n}.{r}": (4, 4) for r in ("lora_down.weight", "lora_up.weight")}
    shapes |= {"lora_unet_norm.w_norm": (4,), "lora_unet_norm.b_norm": (4,)}
    assert _identify(shapes, tmp_path).algorithms == ("lora", "norm")


def test_every_suffix_belongs_to_a_row_of_an_algorithm() -> None:
    rows = {role for row in ALGORITHMS for role in row.allowed}
    assert {suffix.role for suffix in SUFFIXES.values()} <= rows


def test_checkpoints_are_told_by_layout(tmp_path: Path) -> None:
    family = FAMILIES["tiny-sd"]
    single = {
        single_file_place(family, c, path).key: module.shape
        for c, modules in family.components.items()
        for path, module in modules.items()
    }
    found = _identify(single, tmp_path)
    assert (found.kind, found.dialect) == ("checkpoint", "ldm")
    assert [(f.name, f.confidence) for f in found.families] == [("tiny-sd", 1.0)]
    assert found.components == {"unet": 119, "text_encoder": 12}
    unet = {f"{path}.weight": m.shape for path, m in family.components["unet"].items()}
    assert _identify(unet, tmp_path).dialect == "diffusers"
    clip = {
        f"{path}.weight": m.shape for path, m in FAMILIES["sd15"].components["text_encoder"].items()
    }
    found = _identify(clip, tmp_path)
    assert [(f.name, f.confidence) for f in found.families[:2]] == [("sd15", 0.5), ("sdxl", 0.5)]


def test_a_checkpoint_of_another_family_is_one_without_a_name(tmp_path: Path) -> None:
    shapes = {f"model.layers.{n}.self_attn.q_proj.weight": (64, 64) for n in range(12)}
    found = _identify(shapes, tmp_path)
    assert (found.kind, [f.name for f in found.families]) == ("checkpoint", ["llm"])
    assert _codes(found) == ["unknown_family"]


@pytest.mark.parametrize(
    ("shapes", "families", "vectors"),
    [
        ({"emb_params": (3, 768)}, ["sd15"], {"emb_params": 3}),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, ["sdxl"], {"clip_l": 2, "clip_g": 2}),
        ({"clip_l": (1, 768), "clip_g": (1, 1280), "t5xxl": (1, 4096)},
         ["sd3-medium", "sd35-medium", "sd35-large"],
         {"clip_l": 1, "clip_g": 1, "t5xxl": 1}),
        ({"<cat-toy>": (768,)}, ["sd15"], {"<cat-toy>": 1}),
        ({"<cat>": (1024,), "<cat>_1": (1024,)}, ["sd2"], {"<cat>": 1, "<cat>_1": 1}),
        ({"emb_params": (3, 64)}, [], {"emb_params": 3}),
    ],
)  # fmt: skip
def test_embeddings_are_told_by_width(
    shapes: Shapes, families: list[str], vectors: dict[str, int], tmp_path: Path
) -> None:
    found = _identify(shapes, tmp_path)
    assert (found.kind, [f.name for f in found.families]) == ("embedding", families)
    assert found.components == vectors


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("lllite_unet_x.down.0.weight", "ControlNet-LLLite"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("ip_adapter.1.to_k_ip.weight", "IP-Adapter"),
        ("first_stage_model.encoder.conv_in.weight", "VAE"),
    ],
)
def test_other_files_are_called_by_name(key: str, what: str, tmp_path: Path) -> None:
    found = _identify({key: (8, 8)}, tmp_path)
    assert found.kind == "other"
    assert what in found.warnings[0].message


@pytest.mark.parametrize("name", ODD)
def test_every_odd_file_gets_an_answer(name: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(ODD[name]())
    found = identify(path)
    assert found.kind == "other"
    json.dumps(found.to_json())
    assert ("leading_spaces" in _codes(found)) == (name == "leading blanks")


def test_a_malformed_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1234567")
    with pytest.raises(BadFile, match="st_too_small"):
        identify(tmp_path / "f")


def _edited(
    tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], Any], **options: Any
) -> Identification:
    made = make_adapter(tmp_path / "f.safetensors", **({"alphas": 4.0} | options))
    edit(made.tensors)
    save_file(made.tensors, made.path, options.get("metadata"))
    return identify(made.path)


def _set_alpha(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in tensors if key.endswith(".alpha"))
        tensors[key] = torch.tensor(value)

    return edit


def _drop(suffix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(key for key in tensors if key.endswith(suffix))]

    return edit


@pytest.mark.parametrize(
    ("module", "roles", "codes"),
    [
        (MODULE, {"oft_blocks": (4, 24, 24)}, []),
        (MODULE, {"oft_blocks": (2, 4, 24, 24)}, []),
        (MODULE.replace("lora_", "oft_"), {"oft_blocks": (4, 24, 24)}, ["alpha_zero"]),
    ],
)
def test_the_limit_of_a_rotation_is_no_scale(
    module: str, roles: Shapes, codes: list[str], tmp_path: Path
) -> None:
    """LyCORIS writes 0 for no limit; kohya's 0 lets next to nothing through."""
    shapes = {f"{module}.{role}": shape for role, shape in roles.items()}
    assert _codes(_identify(shapes | {f"{module}.alpha": ()}, tmp_path)) == codes


@pytest.mark.parametrize(
    ("edit", "options", "codes"),
    [
        (lambda t: None, {}, []),
        (_set_alpha(0.0), {}, ["alpha_zero"]),
        (_set_alpha(-1.0), {}, ["alpha_negative"]),
        (_set_alpha(float("nan")), {}, ["alpha_not_finite"]),
        (_drop(".alpha"), {}, ["alpha_partial"]),
        (_drop(".lora_up.weight"), {}, ["missing_keys"]),
        (lambda t: t.update(what=torch.ones(1)), {}, ["unknown_keys"]),
        (lambda t: None, {"dialect": "peft", "alphas": None}, ["unsupported"]),
        (lambda t: None, {"metadata": {"ss_network_dim": "32"}}, ["rank_differs"]),
        (lambda t: None, {"metadata": {"ss_network_dim": "4"}}, []),
        (lambda t: None, {"metadata": {"ss_network_dim": "Dynamic"}}, []),
        (lambda t: None, {"metadata": {"sshs_model_hash": "0" * 64}}, ["wrong_stated_hash"]),
    ],
)
def test_doubts_have_stable_codes(
    edit: Callable[[dict[str, torch.Tensor]], None],
    options: dict[str, Any],
    codes: list[str],
    tmp_path: Path,
) -> None:
    assert _codes(_edited(tmp_path, edit, **options)) == codes


def test_tensors_saved_without_gathering_are_seen(tmp_path: Path) -> None:
    shapes = {f"{MODULE}.lora_down.weight": (0,), f"{MODULE}.lora_up.weight": (0,)}
    found = _identify(shapes, tmp_path)
    assert _codes(found) == ["shape_mismatch", "empty_tensors"]


def test_nothing_imports_torch_or_numpy(tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "f.safetensors", alphas=1.0)
    code = (
        "import sys; from pathlib import Path; from merge.identify import identify\n"
        "assert identify(Path(sys.argv[1])).kind == 'adapter'\n"
        "print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(made.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_what_an_adapter_is_about_comes_before_norms_that_come_along(tmp_path: Path) -> None:
    block = "double_blocks.0.img_attn"
    shapes: Shapes = {
        f"{block}.qkv.lora_A.weight": (16, 3072),
        f"{block}.qkv.lora_B.weight": (9216, 16),
        f"{block}.norm.query_norm.scale": (128,),
        f"{block}.norm.key_norm.scale": (128,),
    }
    assert _identify(shapes, tmp_path).algorithms == ("lora", "replacement")
