"""Keys as every tool writes them, at the real sizes of real families: headers alone.

The keys are written out from the tools' own files; what each must mean is in our own names.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from merge.errors import BadAdapter, ShapeMismatch, UnknownModules, Unsupported
from merge.formats.adapters import AdapterLayout, read_layout
from merge.formats.header import read_header
from merge.formats.writer import layout as place
from merge.identify import identify

Shapes = Mapping[str, tuple[int, ...]]
H = 3072  # the width of FLUX.1

Rows = tuple[str, str, tuple[tuple[str, int, int], ...]]  # layout, component, (module, first, rows)


def _file_of(shapes: Shapes, folder: Path, metadata: dict[str, str] | None = None) -> Path:
    path = folder / "adapter.safetensors"
    placed = place([(key, "F16", shape) for key, shape in shapes.items()], metadata or {})
    path.write_bytes(placed.head)
    os.truncate(path, placed.file_size)
    return path


def _lora(
    stem: str, out: int, inner: int, style: str = "kohya", rank: int = 4
) -> dict[str, tuple[int, ...]]:
    down, up = {
        "kohya": (".lora_down.weight", ".lora_up.weight"),
        "peft": (".lora_A.weight", ".lora_B.weight"),
        "xlabs": (".down.weight", ".up.weight"),
        "old": (".lora.down.weight", ".lora.up.weight"),
    }[style]
    return {stem + down: (rank, inner), stem + up: (out, rank)}


def _read(shapes: Shapes, folder: Path, config: Any = None) -> AdapterLayout:
    return read_layout(read_header(_file_of(shapes, folder)), name="f", config=config)


def _rows(found: AdapterLayout) -> dict[str, Rows]:
    return {
        min(entry.keys.values()): (
            entry.layout,
            entry.component,
            tuple((run.module, run.first, run.rows) for run in entry.layer.runs),
        )
        for entry in found.entries
    }


ATTENTION = "transformer_blocks.0.attn"
QKV = tuple((f"{ATTENTION}.{name}", 0, H) for name in ("to_q", "to_k", "to_v"))
SINGLE = "single_transformer_blocks.0"
SINGLE_QKV = tuple((f"{SINGLE}.attn.{name}", 0, H) for name in ("to_q", "to_k", "to_v"))
T5 = "encoder.block.0.layer.0.SelfAttention.q"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"

# Dialect, family, and for every module its keys with what they mean.
MEANINGS: list[tuple[str, str, str, list[tuple[Shapes, Rows]]]] = [
    (
        "Flux by sd-scripts",
        "kohya",
        "flux1",
        [
            (_lora("lora_unet_double_blocks_0_img_attn_qkv", 3 * H, H), ("lora", "transformer", QKV)),
            (
                _lora("lora_unet_single_blocks_0_linear1", 7 * H, H),
                ("lora", "transformer", (*SINGLE_QKV, (f"{SINGLE}.proj_mlp", 0, 4 * H))),
            ),
            (
                _lora("lora_unet_single_blocks_0_linear2", H, 5 * H),
                ("lora", "transformer", ((f"{SINGLE}.proj_out", 0, H),)),
            ),
            # The halves of the last modulation are stored the other way round.
            (
                _lora("lora_unet_final_layer_adaLN_modulation_1", 2 * H, H),
                ("lora", "transformer", (("norm_out.linear", H, H), ("norm_out.linear", 0, H))),
            ),
            (
                _lora("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 768, 768),
                ("lora", "text_encoder", ((CLIP, 0, 768),)),
            ),
            # T5 is the third encoder for sd-scripts and the second in the pipeline.
            (
                _lora("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 4096, 4096),
                ("lora", "text_encoder_2", ((T5, 0, 4096),)),
            ),
        ],
    ),
    (
        "Flux by OneTrainer, with diffusers' names",
        "kohya",
        "flux1",
        [
            (
                _lora("lora_transformer_transformer_blocks_0_attn_to_q", H, H),
                ("lora", "transformer", QKV[:1]),
            ),
            (
                _lora("lora_transformer_transformer_blocks_0_ff_net_0_proj", 4 * H, H),
                ("lora", "transformer", (("transformer_blocks.0.ff.net.0.proj", 0, 4 * H),)),
            ),
            (
                _lora("lora_transformer_transformer_blocks_0_norm1_linear", 6 * H, H),
                ("lora", "transformer", (("transformer_blocks.0.norm1.linear", 0, 6 * H),)),
            ),
            (
                _lora("lora_te2_encoder_block_0_layer_0_SelfAttention_q", 4096, 4096),
                ("lora", "text_encoder_2", ((T5, 0, 4096),)),
            ),
        ],
    ),
    (
        "Flux by OneTrainer, parts of packed layers",
        "diffusers",
        "flux1",
        [
            *(
                (
                    _lora(f"transformer.double_blocks.0.img_attn.qkv.{n}", H, H),
                    ("lora", "transformer", QKV[n : n + 1]),
                )
                for n in range(3)
            ),
            (
                _lora("transformer.single_blocks.0.linear1.3", 4 * H, H),
                ("lora", "transformer", ((f"{SINGLE}.proj_mlp", 0, 4 * H),)),
            ),
        ],
    ),
    (
        "Flux by ai-toolkit and ComfyUI",
        "comfy",
        "flux1",
        [
            (
                _lora("diffusion_model.double_blocks.0.txt_attn.proj", H, H, "peft"),
                ("lora", "transformer", ((f"{ATTENTION}.to_add_out", 0, H),)),
            ),
            (
                _lora(f"text_encoders.clip_l.transformer.{CLIP}", 768, 768),
                ("lora", "text_encoder", ((CLIP, 0, 768),)),
            ),
            (
                _lora(f"text_encoders.t5xxl.transformer.{T5}", 4096, 4096),
                ("lora", "text_encoder_2", ((T5, 0, 4096),)),
            ),
        ],
    ),
    (
        "Flux by diffusers",
        "diffusers",
        "flux1",
        [
            (
                _lora(f"transformer.{ATTENTION}.to_q", H, H, "peft"),
                ("lora", "transformer", QKV[:1]),
            ),
            (
                _lora(f"transformer.base_model.model.{ATTENTION}.to_k", H, H, "peft")
                | {f"transformer.{ATTENTION}.to_k.alpha": ()},
                ("lora", "transformer", QKV[1:2]),
            ),
        ],
    ),
    (
        "Flux by XLabs",
        "xlabs",
        "flux1",
        [
            (
                _lora("double_blocks.0.processor.qkv_lora1", 3 * H, H, "xlabs"),
                ("lora", "transformer", QKV),
            ),
            (
                _lora("double_blocks.0.processor.proj_lora2", H, H, "xlabs"),
                ("lora", "transformer", ((f"{ATTENTION}.to_add_out", 0, H),)),
            ),
            (
                _lora("single_blocks.0.processor.qkv_lora", 3 * H, H, "xlabs"),
                ("lora", "transformer", SINGLE_QKV),
            ),
            (
                _lora("single_blocks.0.processor.proj_lora", H, 5 * H, "xlabs"),
                ("lora", "transformer", ((f"{SINGLE}.proj_out", 0, H),)),
            ),
        ],
    ),
    (
        "Flux by Black Forest Labs: control",
        "bfl",
        "flux1",
        [
            (
                _lora("double_blocks.0.img_attn.qkv", 3 * H, H, "peft")
                | {"double_blocks.0.img_attn.qkv.lora_B.bias": (3 * H,)},
                ("lora", "transformer", QKV),
            ),
            (
                {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
                ("replacement", "transformer", ((f"{ATTENTION}.norm_k", 0, 128),)),
            ),
            # The control image doubles the channels of the first layer.
            (
                _lora("img_in", H, 128, "peft"),
                ("lora", "transformer", (("x_embedder", 0, H),)),
            ),
        ],
    ),
    (
        "Wan with differences beside low rank",
        "comfy",
        "wan-14b",
        [
            (
                _lora("diffusion_model.blocks.0.self_attn.q", 5120, 5120),
                ("lora", "transformer", (("blocks.0.attn1.to_q", 0, 5120),)),
            ),
            (
                {"diffusion_model.blocks.0.self_attn.k.diff_b": (5120,)},
                ("full", "transformer", (("blocks.0.attn1.to_k", 0, 5120),)),
            ),
            (
                {
                    "diffusion_model.blocks.0.norm3.diff": (5120,),
                    "diffusion_model.blocks.0.norm3.diff_b": (5120,),
                },
                ("full", "transformer", (("blocks.0.norm2", 0, 5120),)),
            ),
            (
                {"diffusion_model.blocks.0.self_attn.norm_q.diff": (5120,)},
                ("full", "transformer", (("blocks.0.attn1.norm_q", 0, 5120),)),
            ),
            (
                {"diffusion_model.blocks.0.modulation.diff": (1, 6, 5120)},
                ("full", "transformer", (("blocks.0.scale_shift_table", 0, 1),)),
            ),
            (
                _lora("diffusion_model.head.head", 64, 5120),
                ("lora", "transformer", (("proj_out", 0, 64),)),
            ),
        ],
    ),
    (
        "Wan, official names",
        "diffusers",
        "wan-1.3b",
        [
            (
                _lora("blocks.0.cross_attn.k", 1536, 1536, "peft"),
                ("lora", "transformer", (("blocks.0.attn2.to_k", 0, 1536),)),
            ),
            (
                _lora("blocks.29.ffn.0", 8960, 1536, "peft"),
                ("lora", "transformer", (("blocks.29.ffn.net.0.proj", 0, 8960),)),
            ),
        ],
    ),
    (
        "Wan 2.2, the expert for low noise",
        "diffusers",
        "wan-14b",
        [
            (
                _lora("transformer_2.blocks.0.attn1.to_q", 5120, 5120, "peft"),
                ("lora", "transformer_2", (("blocks.0.attn1.to_q", 0, 5120),)),
            ),
        ],
    ),
    (
        "HunyuanVideo by musubi",
        "kohya",
        "hunyuan-video",
        [
            (
                _lora("lora_unet_double_blocks_0_img_mlp_fc1", 4 * H, H),
                ("lora", "transformer", (("transformer_blocks.0.ff.net.0.proj", 0, 4 * H),)),
            ),
            (_lora("lora_unet_double_blocks_0_img_attn_qkv", 3 * H, H), ("lora", "transformer", QKV)),
        ],
    ),
    (
        "SD 3 by sd-scripts",
        "kohya",
        "sd35-large",
        [
            (
                _lora("lora_unet_joint_blocks_0_x_block_attn_qkv", 3 * 2432, 2432),
                (
                    "lora",
                    "transformer",
                    tuple((f"{ATTENTION}.{n}", 0, 2432) for n in ("to_q", "to_k", "to_v")),
                ),
            ),
            (
                _lora("lora_te2_text_model_encoder_layers_31_mlp_fc1", 5120, 1280),
                (
                    "lora",
                    "text_encoder_2",
                    (("text_model.encoder.layers.31.mlp.fc1", 0, 5120),),
                ),
            ),
            (
                _lora("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 4096, 4096),
                ("lora", "text_encoder_3", ((T5, 0, 4096),)),
            ),
        ],
    ),
    (
        "Z-Image by diffusers",
        "diffusers",
        "z-image",
        [
            (
                _lora("transformer.layers.0.attention.to_q", 3840, 3840, "peft"),
                ("lora", "transformer", (("layers.0.attention.to_q", 0, 3840),)),
            ),
            (
                _lora("transformer.all_x_embedder.2-1", 3840, 64, "peft"),
                ("lora", "transformer", (("all_x_embedder.2-1", 0, 3840),)),
            ),
        ],
    ),
    (
        "Lumina 2: queries are wider than keys",
        "comfy",
        "lumina2",
        [
            (
                _lora("diffusion_model.layers.0.attention.qkv", 3840, 2304, "peft"),
                (
                    "lora",
                    "transformer",
                    (
                        ("layers.0.attn.to_q", 0, 2304),
                        ("layers.0.attn.to_k", 0, 768),
                        ("layers.0.attn.to_v", 0, 768),
                    ),
                ),
            ),
        ],
    ),
    (
        "SD 1 by additional networks",
        "kohya",
        "sd15",
        [
            (
                _lora(
                    "lora_te_wrapped_transformer_text_model_encoder_layers_0_self_attn_q_proj",
                    768,
                    768,
                ),
                ("lora", "text_encoder", ((CLIP, 0, 768),)),
            ),
            (
                _lora("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 1280, 768),
                (
                    "lora",
                    "unet",
                    (("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 0, 1280),),
                ),
            ),
        ],
    ),
    (
        "SD 1 by diffusers' first attention processors",
        "diffusers_old",
        "sd15",
        [
            (
                _lora(
                    "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora",
                    1280,
                    768,
                    "xlabs",
                ),
                (
                    "lora",
                    "unet",
                    (("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 0, 1280),),
                ),
            ),
            (
                _lora(
                    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
                    1280,
                    1280,
                    "old",
                ),
                (
                    "lora",
                    "unet",
                    (("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", 0, 1280),),
                ),
            ),
        ],
    ),
    (
        "SDXL with kohya's OFT",
        "kohya",
        "sdxl",
        [
            (
                {
                    "oft_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.oft_blocks": (4, 160, 160),
                    "oft_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha": (),
                },
                (
                    "oft-kohya",
                    "unet",
                    (("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", 0, 640),),
                ),
            ),
        ],
    ),
    (
        "Flux with kohya's OFT, a rotation for each part",
        "kohya",
        "flux1",
        [
            (
                {
                    "oft_unet_double_blocks_0_img_attn_qkv.alpha": (),
                    **{
                        f"oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.{n}": (4, H // 4, H // 4)
                        for n in range(3)
                    },
                },
                ("oft-kohya", "transformer", QKV),
            ),
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("dialect", "family", "modules"), [m[1:] for m in MEANINGS], ids=[m[0] for m in MEANINGS]
)
def test_keys_mean_rows_of_our_modules(
    dialect: str, family: str, modules: list[tuple[Shapes, Rows]], tmp_path: Path
) -> None:
    shapes = {key: shape for its, _ in modules for key, shape in its.items()}
    found = _read(shapes, tmp_path)
    assert found.dialect == dialect
    assert family in found.families
    assert _rows(found) == {min(its): meaning for its, meaning in modules}
    claimed = [key for entry in found.entries for key in entry.keys.values()]
    assert sorted(claimed) == sorted(shapes)
    described = identify(tmp_path / "adapter.safetensors", hashes=False)
    assert (described.dialect, described.modules) == (dialect, len(modules))
    assert family in {guess.name for guess in described.families}
    # The sparse file is all zeros, alphas too.
    assert {warning.code for warning in described.warnings} <= {"alpha_zero", "alpha_partial"}


def test_weight_and_bias_of_one_layer_are_two_entries_of_different_algorithms(
    tmp_path: Path,
) -> None:
    stem = "diffusion_model.blocks.0.self_attn.q"
    found = _read(_lora(stem, 5120, 5120) | {f"{stem}.diff_b": (5120,)}, tmp_path)
    lora, full = found.entries
    assert (lora.layout, lora.touches_weight, lora.touches_bias) == ("lora", True, False)
    assert (full.layout, full.touches_weight, full.touches_bias) == ("full", False, True)
    assert lora.layer == full.layer


def test_rows_under_two_names_are_found_twice(tmp_path: Path) -> None:
    shapes = _lora("transformer.double_blocks.0.img_attn.qkv", 3 * H, H)
    for name in ("transformer.double_blocks.0.img_attn.qkv.1", f"transformer.{ATTENTION}.to_k"):
        with pytest.raises(BadAdapter, match="is there twice"):
            _read(shapes | _lora(name, H, H), tmp_path)


def test_part_of_a_packed_layer_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    shapes = _lora("lora_unet_double_blocks_0_img_attn_qkv", 3 * H, H)
    with pytest.raises(UnknownModules, match=r"img_attn.qkv.3"):
        _read(shapes | _lora("transformer.double_blocks.0.img_attn.qkv.3", H, H), tmp_path)


def test_a_file_for_flux_is_not_taken_for_hunyuan_video(tmp_path: Path) -> None:
    """They share names of packed projections and their width; depth and other names differ."""
    shapes = _lora("lora_unet_double_blocks_0_img_attn_qkv", 3 * H, H)
    assert {"flux1", "hunyuan-video"} <= set(_read(shapes, tmp_path).families)
    deep = shapes | _lora("lora_unet_single_blocks_39_linear2", H, 5 * H)
    assert _read(deep, tmp_path).families == ("hunyuan-video",)
    flux = shapes | _lora("lora_unet_double_blocks_0_img_mlp_0", 4 * H, H)
    assert "hunyuan-video" not in [*_read(flux, tmp_path).families][:1]
    both = deep | _lora("lora_unet_double_blocks_0_nothing", H, H)
    with pytest.raises(UnknownModules, match="double_blocks_0_nothing"):
        _read(both, tmp_path)


def test_an_adapter_of_sd_1_is_refused_whole_by_sdxl(tmp_path: Path) -> None:
    stem = "unet.mid_block.attentions.0.transformer_blocks.0"
    shapes = _lora(f"{stem}.attn1.to_q", 1280, 1280, "peft")
    assert {"sd15", "sdxl"} <= set(_read(shapes, tmp_path).families)
    shapes |= _lora(f"{stem}.attn2.to_k", 1280, 768, "peft")
    assert "sdxl" not in _read(shapes, tmp_path).families
    shapes |= _lora(f"{stem}.attn2.to_v", 1280, 2048, "peft")
    with pytest.raises(ShapeMismatch, match="attn2.to_"):
        _read(shapes, tmp_path)


MLX: dict[str, tuple[int, ...]] = {"model.layers.0.self_attn.q_proj.lora_a": (64, 8),
       "model.layers.0.self_attn.q_proj.lora_b": (8, 32)}  # fmt: skip


def test_mlx_states_the_scale_itself(tmp_path: Path) -> None:
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 10.0}}
    (entry,) = _read(MLX, tmp_path, config).entries
    assert (entry.layout, entry.layer.path) == ("lora-mlx", "model.layers.0.self_attn.q_proj")
    assert (entry.layer.shape, entry.rank, entry.facts) == ((32, 64), 8, {"scale": 10.0})
    (entry,) = _read(MLX, tmp_path, {"lora_parameters": {}}).entries
    assert entry.facts == {"scale": 20.0}
    (entry,) = _read(MLX | {"model.layers.0.self_attn.q_proj.m": (32,)}, tmp_path, config).entries
    assert (entry.algorithm, entry.needs) == ("dora", "rows")
    with pytest.raises(
        Unsupported, match="adapter_config.json, which holds its alphas, is missing"
    ):
        _read(MLX, tmp_path)


def test_embeddings_of_mlx_are_refused(tmp_path: Path) -> None:
    stem = "model.embed_tokens"
    with pytest.raises(Unsupported, match="an embedding, whose factors MLX stores the other way"):
        _read({f"{stem}.lora_a": (64, 8), f"{stem}.lora_b": (8, 32)}, tmp_path, {})


def test_a_supernet_of_glora_needs_to_know_what_counts(tmp_path: Path) -> None:
    shapes = {f"x.glora_{role}": (8, 2) if role.endswith("d") else (2, 8) for role in ("Ad", "Au")}
    with pytest.raises(Unsupported, match="its eval_config, which says what counts, is missing"):
        _read(shapes, tmp_path)
    chosen = {"eval_config": {"A": "LoRA_2"}}
    (entry,) = _read(shapes, tmp_path, chosen).entries
    assert (entry.layout, entry.facts) == ("glora-paper", chosen)


def test_onetrainer_says_what_it_adds_to_norms(tmp_path: Path) -> None:
    stem = f"transformer.{ATTENTION}.to_q"
    shapes = _lora(stem, H, H) | {f"{stem}.dora_scale": (1, H)}
    for dtype, step in (("FLOAT_32", 2**-23), ("BFLOAT_16", 2**-7)):
        settings = f'{{"lora_decompose_norm_epsilon": true, "lora_weight_dtype": "{dtype}"}}'
        header = read_header(_file_of(shapes, tmp_path, {"ot_config": settings}))
        (entry,) = read_layout(header, name="f").entries
        assert (entry.needs, entry.facts) == ("whole", {"dora_eps": step})


def test_packed_experts_of_some_models_are_stored_the_other_way_round(tmp_path: Path) -> None:
    shapes = _lora("base_model.model.layers.0.mlp.experts", 12, 12, "peft", rank=6)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_parameters": ["mlp.experts.gate_up_proj"],
    }
    (entry,) = _read(shapes, tmp_path, config).entries
    assert (entry.layout, entry.layer.shape) == ("lora-experts", (3, 12, 12))
    assert entry.facts == {"scale": 2.0, "n_experts": 3}
    named = config | {"auto_mapping": {"base_model_class": "GptOssForCausalLM"}}
    (entry,) = _read(shapes, tmp_path, named).entries
    assert entry.facts["experts_transposed"] is True
    with pytest.raises(ShapeMismatch, match="no list of ranks 4"):
        _read(shapes, tmp_path, config | {"r": 4})


def test_torchtune_names_layers_its_own_way_and_orders_rows_by_head(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, out in (("attn.v_proj", 16), ("attn.output_proj", 64), ("mlp.w1", 128)):
        shapes |= {
            f"layers.3.{name}.lora_a.weight": (8, 64),
            f"layers.3.{name}.lora_b.weight": (out, 8),
        }
    config = {"r": 8, "lora_alpha": 16}
    found = _read(shapes, tmp_path, config)
    assert (found.dialect, found.alpha_source) == ("torchtune", "config")
    names = ["self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"]
    assert [entry.layer.path for entry in found.entries] == [f"model.layers.3.{n}" for n in names]
    assert all(entry.facts == {"scale": 2.0, "rope_heads": 0} for entry in found.entries)
    query = {
        "layers.3.attn.k_proj.lora_a.weight": (8, 64),
        "layers.3.attn.k_proj.lora_b.weight": (16, 8),
    }
    (entry,) = _read(query, tmp_path, config | {"num_kv_heads": 2}).entries
    assert entry.facts["rope_heads"] == 2
    with pytest.raises(Unsupported, match="orders rows .* by head, and num_kv_heads is not stated"):
        _read(query, tmp_path, config)


def test_peft_attention_is_its_packed_projection_and_a_doubled_output(tmp_path: Path) -> None:
    stem = "base_model.model.attn"
    shapes = _lora(stem, 24, 8, "peft") | _lora(f"{stem}.base_layer.out_proj", 8, 8, "peft")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    packed, output = _read(shapes, tmp_path, config).entries
    assert (packed.layout, packed.layer.path, packed.layer.kind) == (
        "lora-mha",
        "attn.in_proj_weight",
        "parameter",
    )
    assert (output.layout, output.layer.path) == ("lora", "attn.out_proj")
    described = identify(tmp_path / "adapter.safetensors", hashes=False, config=config)
    assert [warning.code for warning in described.warnings] == ["open_family", "attention_twice"]


def test_gpt_2_has_a_path_that_begins_like_a_component(tmp_path: Path) -> None:
    shapes = _lora("base_model.model.transformer.h.0.attn.c_attn", 24, 8, "peft")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "fan_in_fan_out": True}
    (entry,) = _read(shapes, tmp_path, config).entries
    assert entry.name == "model.transformer.h.0.attn.c_attn"
    assert entry.facts == {"scale": 1.0, "fan_in_fan_out": True}


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"prompt_embeddings": (8, 64)}, "prompts are inputs and not weights"),
        ({"base_model.model.x.randlora_lambda": (4, 8)}, "RandLoRA regenerates its projections"),
        ({"base_model.model.x.oft_r": (4, 8, 8)}, "PEFT before 0.16"),
        ({"base_model.model.x.fourierft_spectrum": (8,)}, "FourierFT regenerates"),
        ({"base_model.model.x.miss_block": (4, 8)}, "miss is not a method we merge"),
        ({"x.down": (4, 8), "x.up": (8, 4)}, "Control-LoRA"),
        (
            _lora("diffusion_model.img_in", H, 128)
            | {"diffusion_model.img_in.reshape_weight": (2,)},
            "enlarges layers of the base",
        ),
    ],
)
def test_what_is_recognised_says_why_it_is_not_merged(
    keys: Shapes, what: str, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=what):
        _read(keys, tmp_path)
    described = identify(tmp_path / "adapter.safetensors", hashes=False)
    assert described.kind == "adapter"
    assert described.warnings[0].code == "unsupported"
    assert what in described.warnings[0].message
