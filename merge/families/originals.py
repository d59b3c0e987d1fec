"""Names and packing in the code that models were published with, where they are not diffusers'.

A rule is `original path: our path`. `#` is the first number in our path, `$` stands for it in the
last block alone. Braces list the modules whose rows follow each other in one original layer, and
`~` says that the halves of the rows are swapped: most original code has shift before scale, and
diffusers scale before shift. A path that no rule names is spelled alike. An original path that ends
with `.scale` is a bare parameter.

The rules are those of the single-file converters in diffusers 0.42.1, which prove them row by row
in the tests; PixArt's, HunyuanVideo's second spelling and CLIP's have no converter there.
"""

from collections.abc import Mapping

Rules = Mapping[str, str]

_FLUX_ATTENTION = {
    "double_blocks.#.img_attn.qkv": "transformer_blocks.#.attn.{to_q,to_k,to_v}",
    "double_blocks.#.txt_attn.qkv": "transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj}",
    "double_blocks.#.img_attn.proj": "transformer_blocks.#.attn.to_out.0",
    "double_blocks.#.txt_attn.proj": "transformer_blocks.#.attn.to_add_out",
    "double_blocks.#.img_attn.norm.query_norm.scale": "transformer_blocks.#.attn.norm_q",
    "double_blocks.#.img_attn.norm.key_norm.scale": "transformer_blocks.#.attn.norm_k",
    "double_blocks.#.txt_attn.norm.query_norm.scale": "transformer_blocks.#.attn.norm_added_q",
    "double_blocks.#.txt_attn.norm.key_norm.scale": "transformer_blocks.#.attn.norm_added_k",
    "single_blocks.#.norm.query_norm.scale": "single_transformer_blocks.#.attn.norm_q",
    "single_blocks.#.norm.key_norm.scale": "single_transformer_blocks.#.attn.norm_k",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
}
_FLUX_BLOCKS = _FLUX_ATTENTION | {
    "double_blocks.#.img_mlp.0": "transformer_blocks.#.ff.net.0.proj",
    "double_blocks.#.img_mlp.2": "transformer_blocks.#.ff.net.2",
    "double_blocks.#.txt_mlp.0": "transformer_blocks.#.ff_context.net.0.proj",
    "double_blocks.#.txt_mlp.2": "transformer_blocks.#.ff_context.net.2",
    "single_blocks.#.linear1": "single_transformer_blocks.#.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}",
    "single_blocks.#.linear2": "single_transformer_blocks.#.proj_out",
}
_FLUX = _FLUX_BLOCKS | {
    "double_blocks.#.img_mod.lin": "transformer_blocks.#.norm1.linear",
    "double_blocks.#.txt_mod.lin": "transformer_blocks.#.norm1_context.linear",
    "single_blocks.#.modulation.lin": "single_transformer_blocks.#.norm.linear",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear~",
}
_CHROMA = _FLUX_BLOCKS | {
    "distilled_guidance_layer.layers.#.in_layer": "distilled_guidance_layer.layers.#.linear_1",
    "distilled_guidance_layer.layers.#.out_layer": "distilled_guidance_layer.layers.#.linear_2",
    "distilled_guidance_layer.norms.#.scale": "distilled_guidance_layer.norms.#",
}
_FLUX2 = _FLUX_ATTENTION | {
    "double_blocks.#.img_mlp.0": "transformer_blocks.#.ff.linear_in",
    "double_blocks.#.img_mlp.2": "transformer_blocks.#.ff.linear_out",
    "double_blocks.#.txt_mlp.0": "transformer_blocks.#.ff_context.linear_in",
    "double_blocks.#.txt_mlp.2": "transformer_blocks.#.ff_context.linear_out",
    "single_blocks.#.linear1": "single_transformer_blocks.#.attn.to_qkv_mlp_proj",
    "single_blocks.#.linear2": "single_transformer_blocks.#.attn.to_out",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear~",
}
_SD3 = {
    "joint_blocks.#.x_block.attn.qkv": "transformer_blocks.#.attn.{to_q,to_k,to_v}",
    "joint_blocks.#.x_block.attn.proj": "transformer_blocks.#.attn.to_out.0",
    "joint_blocks.#.x_block.attn.ln_q": "transformer_blocks.#.attn.norm_q",
    "joint_blocks.#.x_block.attn.ln_k": "transformer_blocks.#.attn.norm_k",
    "joint_blocks.#.x_block.attn2.qkv": "transformer_blocks.#.attn2.{to_q,to_k,to_v}",
    "joint_blocks.#.x_block.attn2.proj": "transformer_blocks.#.attn2.to_out.0",
    "joint_blocks.#.x_block.attn2.ln_q": "transformer_blocks.#.attn2.norm_q",
    "joint_blocks.#.x_block.attn2.ln_k": "transformer_blocks.#.attn2.norm_k",
    "joint_blocks.#.x_block.mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
    "joint_blocks.#.x_block.mlp.fc2": "transformer_blocks.#.ff.net.2",
    "joint_blocks.#.x_block.adaLN_modulation.1": "transformer_blocks.#.norm1.linear",
    "joint_blocks.#.context_block.attn.qkv": (
        "transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj}"
    ),
    "joint_blocks.#.context_block.attn.proj": "transformer_blocks.#.attn.to_add_out",
    "joint_blocks.#.context_block.attn.ln_q": "transformer_blocks.#.attn.norm_added_q",
    "joint_blocks.#.context_block.attn.ln_k": "transformer_blocks.#.attn.norm_added_k",
    "joint_blocks.#.context_block.mlp.fc1": "transformer_blocks.#.ff_context.net.0.proj",
    "joint_blocks.#.context_block.mlp.fc2": "transformer_blocks.#.ff_context.net.2",
    "joint_blocks.#.context_block.adaLN_modulation.1": "transformer_blocks.#.norm1_context.linear",
    "joint_blocks.$.context_block.adaLN_modulation.1": "transformer_blocks.$.norm1_context.linear~",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear~",
}
_PIXART = {
    "blocks.#.attn.qkv": "transformer_blocks.#.attn1.{to_q,to_k,to_v}",
    "blocks.#.attn.proj": "transformer_blocks.#.attn1.to_out.0",
    "blocks.#.cross_attn.q_linear": "transformer_blocks.#.attn2.to_q",
    "blocks.#.cross_attn.kv_linear": "transformer_blocks.#.attn2.{to_k,to_v}",
    "blocks.#.cross_attn.proj": "transformer_blocks.#.attn2.to_out.0",
    "blocks.#.mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
    "blocks.#.mlp.fc2": "transformer_blocks.#.ff.net.2",
    "blocks.#.scale_shift_table": "transformer_blocks.#.scale_shift_table",
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
}
_SANA = {
    "blocks.#.attn.qkv": "transformer_blocks.#.attn1.{to_q,to_k,to_v}",
    "blocks.#.attn.proj": "transformer_blocks.#.attn1.to_out.0",
    "blocks.#.cross_attn.q_linear": "transformer_blocks.#.attn2.to_q",
    "blocks.#.cross_attn.kv_linear": "transformer_blocks.#.attn2.{to_k,to_v}",
    "blocks.#.cross_attn.proj": "transformer_blocks.#.attn2.to_out.0",
    "blocks.#.mlp.inverted_conv.conv": "transformer_blocks.#.ff.conv_inverted",
    "blocks.#.mlp.depth_conv.conv": "transformer_blocks.#.ff.conv_depth",
    "blocks.#.mlp.point_conv.conv": "transformer_blocks.#.ff.conv_point",
    "blocks.#.scale_shift_table": "transformer_blocks.#.scale_shift_table",
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
}
_AURAFLOW = {
    "double_layers.#.attn.w2q": "joint_transformer_blocks.#.attn.to_q",
    "double_layers.#.attn.w2k": "joint_transformer_blocks.#.attn.to_k",
    "double_layers.#.attn.w2v": "joint_transformer_blocks.#.attn.to_v",
    "double_layers.#.attn.w2o": "joint_transformer_blocks.#.attn.to_out.0",
    "double_layers.#.attn.w1q": "joint_transformer_blocks.#.attn.add_q_proj",
    "double_layers.#.attn.w1k": "joint_transformer_blocks.#.attn.add_k_proj",
    "double_layers.#.attn.w1v": "joint_transformer_blocks.#.attn.add_v_proj",
    "double_layers.#.attn.w1o": "joint_transformer_blocks.#.attn.to_add_out",
    "double_layers.#.mlpX.c_fc1": "joint_transformer_blocks.#.ff.linear_1",
    "double_layers.#.mlpX.c_fc2": "joint_transformer_blocks.#.ff.linear_2",
    "double_layers.#.mlpX.c_proj": "joint_transformer_blocks.#.ff.out_projection",
    "double_layers.#.mlpC.c_fc1": "joint_transformer_blocks.#.ff_context.linear_1",
    "double_layers.#.mlpC.c_fc2": "joint_transformer_blocks.#.ff_context.linear_2",
    "double_layers.#.mlpC.c_proj": "joint_transformer_blocks.#.ff_context.out_projection",
    "double_layers.#.modX.1": "joint_transformer_blocks.#.norm1.linear",
    "double_layers.#.modC.1": "joint_transformer_blocks.#.norm1_context.linear",
    "single_layers.#.attn.w1q": "single_transformer_blocks.#.attn.to_q",
    "single_layers.#.attn.w1k": "single_transformer_blocks.#.attn.to_k",
    "single_layers.#.attn.w1v": "single_transformer_blocks.#.attn.to_v",
    "single_layers.#.attn.w1o": "single_transformer_blocks.#.attn.to_out.0",
    "single_layers.#.mlp.c_fc1": "single_transformer_blocks.#.ff.linear_1",
    "single_layers.#.mlp.c_fc2": "single_transformer_blocks.#.ff.linear_2",
    "single_layers.#.mlp.c_proj": "single_transformer_blocks.#.ff.out_projection",
    "single_layers.#.modCX.1": "single_transformer_blocks.#.norm1.linear",
    "t_embedder.mlp.0": "time_step_proj.linear_1",
    "t_embedder.mlp.2": "time_step_proj.linear_2",
    "cond_seq_linear": "context_embedder",
    "init_x_linear": "pos_embed.proj",
    "positional_encoding": "pos_embed.pos_embed",
    "final_linear": "proj_out",
    "modF.1": "norm_out.linear~",
}
_WAN = {
    "blocks.#.self_attn.q": "blocks.#.attn1.to_q",
    "blocks.#.self_attn.k": "blocks.#.attn1.to_k",
    "blocks.#.self_attn.v": "blocks.#.attn1.to_v",
    "blocks.#.self_attn.o": "blocks.#.attn1.to_out.0",
    "blocks.#.self_attn.norm_q": "blocks.#.attn1.norm_q",
    "blocks.#.self_attn.norm_k": "blocks.#.attn1.norm_k",
    "blocks.#.cross_attn.q": "blocks.#.attn2.to_q",
    "blocks.#.cross_attn.k": "blocks.#.attn2.to_k",
    "blocks.#.cross_attn.v": "blocks.#.attn2.to_v",
    "blocks.#.cross_attn.o": "blocks.#.attn2.to_out.0",
    "blocks.#.cross_attn.k_img": "blocks.#.attn2.add_k_proj",
    "blocks.#.cross_attn.v_img": "blocks.#.attn2.add_v_proj",
    "blocks.#.cross_attn.norm_q": "blocks.#.attn2.norm_q",
    "blocks.#.cross_attn.norm_k": "blocks.#.attn2.norm_k",
    "blocks.#.cross_attn.norm_k_img": "blocks.#.attn2.norm_added_k",
    "blocks.#.ffn.0": "blocks.#.ffn.net.0.proj",
    "blocks.#.ffn.2": "blocks.#.ffn.net.2",
    "blocks.#.norm3": "blocks.#.norm2",
    "blocks.#.modulation": "blocks.#.scale_shift_table",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_HUNYUAN_REFINER = "context_embedder.token_refiner.refiner_blocks"
_HUNYUAN_VIDEO = {
    "double_blocks.#.img_attn_qkv": "transformer_blocks.#.attn.{to_q,to_k,to_v}",
    "double_blocks.#.txt_attn_qkv": "transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj}",
    "double_blocks.#.img_attn_proj": "transformer_blocks.#.attn.to_out.0",
    "double_blocks.#.txt_attn_proj": "transformer_blocks.#.attn.to_add_out",
    "double_blocks.#.img_attn_q_norm": "transformer_blocks.#.attn.norm_q",
    "double_blocks.#.img_attn_k_norm": "transformer_blocks.#.attn.norm_k",
    "double_blocks.#.txt_attn_q_norm": "transformer_blocks.#.attn.norm_added_q",
    "double_blocks.#.txt_attn_k_norm": "transformer_blocks.#.attn.norm_added_k",
    "double_blocks.#.img_mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
    "double_blocks.#.img_mlp.fc2": "transformer_blocks.#.ff.net.2",
    "double_blocks.#.txt_mlp.fc1": "transformer_blocks.#.ff_context.net.0.proj",
    "double_blocks.#.txt_mlp.fc2": "transformer_blocks.#.ff_context.net.2",
    "double_blocks.#.img_mod.linear": "transformer_blocks.#.norm1.linear",
    "double_blocks.#.txt_mod.linear": "transformer_blocks.#.norm1_context.linear",
    "single_blocks.#.linear1": "single_transformer_blocks.#.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}",
    "single_blocks.#.linear2": "single_transformer_blocks.#.proj_out",
    "single_blocks.#.q_norm": "single_transformer_blocks.#.attn.norm_q",
    "single_blocks.#.k_norm": "single_transformer_blocks.#.attn.norm_k",
    "single_blocks.#.modulation.linear": "single_transformer_blocks.#.norm.linear",
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "txt_in.individual_token_refiner.blocks.#.self_attn_qkv": (
        f"{_HUNYUAN_REFINER}.#.attn.{{to_q,to_k,to_v}}"
    ),
    "txt_in.individual_token_refiner.blocks.#.self_attn_proj": f"{_HUNYUAN_REFINER}.#.attn.to_out.0",
    "txt_in.individual_token_refiner.blocks.#.norm1": f"{_HUNYUAN_REFINER}.#.norm1",
    "txt_in.individual_token_refiner.blocks.#.norm2": f"{_HUNYUAN_REFINER}.#.norm2",
    "txt_in.individual_token_refiner.blocks.#.mlp.fc1": f"{_HUNYUAN_REFINER}.#.ff.net.0.proj",
    "txt_in.individual_token_refiner.blocks.#.mlp.fc2": f"{_HUNYUAN_REFINER}.#.ff.net.2",
    "txt_in.individual_token_refiner.blocks.#.adaLN_modulation.1": (
        f"{_HUNYUAN_REFINER}.#.norm_out.linear"
    ),
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear~",
}
# ComfyUI renames the original so that its Flux code serves both.
_COMFY_HUNYUAN = (
    ("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.in_layer"),
    ("txt_in.t_embedder.mlp.2", "txt_in.t_embedder.out_layer"),
    ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"),
    ("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer"),
    ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"),
    ("_mod.linear", "_mod.lin"),
    ("modulation.linear", "modulation.lin"),
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("_attn_q_norm", "_attn.norm.query_norm.scale"),
    ("_attn_k_norm", "_attn.norm.key_norm.scale"),
    (".q_norm", ".norm.query_norm.scale"),
    (".k_norm", ".norm.key_norm.scale"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
)


def _as_comfy(path: str) -> str:
    for theirs, comfy in _COMFY_HUNYUAN:
        path = path.replace(theirs, comfy)
    return path


_LUMINA_BLOCK = {
    "attention.qkv": "attn.{to_q,to_k,to_v}",
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "attention_norm1": "norm1.norm",
    "attention_norm2": "norm2",
    "adaLN_modulation.1": "norm1.linear",
}
_LUMINA2 = {
    f"{stack}.#.{theirs}": f"{stack}.#.{ours}"
    for stack in ("layers", "noise_refiner", "context_refiner")
    for theirs, ours in _LUMINA_BLOCK.items()
} | {
    "context_refiner.#.attention_norm1": "context_refiner.#.norm1",
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}
_Z_IMAGE = {
    f"{stack}.#.attention.{theirs}": f"{stack}.#.attention.{ours}"
    for stack in ("layers", "noise_refiner", "context_refiner")
    for theirs, ours in {
        "qkv": "{to_q,to_k,to_v}",
        "out": "to_out.0",
        "q_norm": "norm_q",
        "k_norm": "norm_k",
    }.items()
} | {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
_LTX = {
    f"transformer_blocks.#.{attention}.{theirs}": f"transformer_blocks.#.{attention}.{ours}"
    for attention in ("attn1", "attn2")
    for theirs, ours in {"q_norm": "norm_q", "k_norm": "norm_k"}.items()
} | {
    "patchify_proj": "proj_in",
    "adaln_single.emb.timestep_embedder.linear_1": "time_embed.emb.timestep_embedder.linear_1",
    "adaln_single.emb.timestep_embedder.linear_2": "time_embed.emb.timestep_embedder.linear_2",
    "adaln_single.linear": "time_embed.linear",
}
_MOCHI = {
    "blocks.#.attn.qkv_x": "transformer_blocks.#.attn1.{to_q,to_k,to_v}",
    "blocks.#.attn.qkv_y": "transformer_blocks.#.attn1.{add_q_proj,add_k_proj,add_v_proj}",
    "blocks.#.attn.q_norm_x": "transformer_blocks.#.attn1.norm_q",
    "blocks.#.attn.k_norm_x": "transformer_blocks.#.attn1.norm_k",
    "blocks.#.attn.q_norm_y": "transformer_blocks.#.attn1.norm_added_q",
    "blocks.#.attn.k_norm_y": "transformer_blocks.#.attn1.norm_added_k",
    "blocks.#.attn.proj_x": "transformer_blocks.#.attn1.to_out.0",
    "blocks.#.attn.proj_y": "transformer_blocks.#.attn1.to_add_out",
    "blocks.#.mlp_x.w1": "transformer_blocks.#.ff.net.0.proj~",
    "blocks.#.mlp_x.w2": "transformer_blocks.#.ff.net.2",
    "blocks.#.mlp_y.w1": "transformer_blocks.#.ff_context.net.0.proj~",
    "blocks.#.mlp_y.w2": "transformer_blocks.#.ff_context.net.2",
    "blocks.#.mod_x": "transformer_blocks.#.norm1.linear",
    "blocks.#.mod_y": "transformer_blocks.#.norm1_context.linear",
    "blocks.$.mod_y": "transformer_blocks.$.norm1_context.linear_1",
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    "t5_y_embedder.to_kv": "time_embed.pooler.to_kv",
    "t5_y_embedder.to_q": "time_embed.pooler.to_q",
    "t5_y_embedder.to_out": "time_embed.pooler.to_out",
    "t5_yproj": "time_embed.caption_proj",
    "final_layer.mod": "norm_out.linear~",
    "final_layer.linear": "proj_out",
}

ORIGINALS: Mapping[str, Rules] = {
    "auraflow": _AURAFLOW,
    "chroma": _CHROMA,
    "flux": _FLUX,
    "flux2": _FLUX2,
    "hunyuan-video": _HUNYUAN_VIDEO,
    "hunyuan-video-comfy": {_as_comfy(path): ours for path, ours in _HUNYUAN_VIDEO.items()},
    "ltx": _LTX,
    "lumina2": _LUMINA2,
    "mochi": _MOCHI,
    "pixart": _PIXART,
    "sana": _SANA,
    "sd3": _SD3,
    "wan": _WAN,
    "z-image": _Z_IMAGE,
}
