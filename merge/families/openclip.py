"""CLIP text encoders in OpenCLIP's names, as single files of SD 2.x and SDXL hold them.

diffusers' converter proves the map in the tests.
"""

from merge.families.layers import Place

_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OUTSIDE = {
    "text_model.final_layer_norm": "ln_final",
    "text_model.embeddings.token_embedding": "token_embedding",
}
_FUSED = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


def place(prefix: str, module: str, parameter: str, width: int) -> Place:
    """Where a CLIP parameter lies in OpenCLIP's layout; `width` is the model's.

    q, k and v are rows of one `in_proj_weight`; `text_projection` is a bare matrix the other
    way round, and `positional_embedding` a bare one.
    """
    if module == "text_projection":
        return Place(f"{prefix}text_projection", is_transposed=True)
    if module == "text_model.embeddings.position_embedding":
        return Place(f"{prefix}positional_embedding")
    if module in _OUTSIDE:
        return Place(f"{prefix}{_OUTSIDE[module]}.{parameter}")
    layer, inner = module.removeprefix("text_model.encoder.layers.").split(".", 1)
    block = f"{prefix}transformer.resblocks.{layer}"
    last = inner.rpartition(".")[2]
    if last in _FUSED:
        start = _FUSED[last] * width
        return Place(f"{block}.attn.in_proj_{parameter}", (start, start + width))
    return Place(f"{block}.{_LAYER[inner]}.{parameter}")
