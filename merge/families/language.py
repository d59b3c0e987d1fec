"""Language models by the widths of their layers, as evidence for people.

Widths are those of the published configurations; fine-tunes share them, and so do strangers.
"""

import re
from collections.abc import Mapping

Extent = tuple[int, int]  # (out, in) of a weight

# Model -> (hidden size, width of k and v, width of the MLP).
_WIDTHS = {
    "Llama 2 7B": (4096, 4096, 11008),
    "Llama 2 13B": (5120, 5120, 13824),
    "Llama 2 and 3 70B": (8192, 1024, 28672),
    "Llama 3 8B": (4096, 1024, 14336),
    "Llama 3.2 1B": (2048, 512, 8192),
    "Llama 3.2 3B": (3072, 1024, 8192),
    "TinyLlama 1.1B": (2048, 256, 5632),
    "Mistral 7B": (4096, 1024, 14336),
    "Mistral Nemo 12B": (5120, 1024, 14336),
    "Mistral Small 24B": (5120, 1024, 32768),
    "Qwen2.5 0.5B": (896, 128, 4864),
    "Qwen2.5 1.5B": (1536, 256, 8960),
    "Qwen2.5 3B": (2048, 256, 11008),
    "Qwen2.5 7B": (3584, 512, 18944),
    "Qwen2.5 14B": (5120, 1024, 13824),
    "Qwen2.5 32B": (5120, 1024, 27648),
    "Qwen2.5 72B": (8192, 1024, 29568),
    "Qwen3 0.6B": (1024, 1024, 3072),
    "Qwen3 1.7B": (2048, 1024, 6144),
    "Qwen3 4B": (2560, 1024, 9728),
    "Qwen3 8B": (4096, 1024, 12288),
    "Qwen3 14B": (5120, 1024, 17408),
    "Qwen3 32B": (5120, 1024, 25600),
    "Gemma 2 2B": (2304, 1024, 9216),
    "Gemma 2 9B": (3584, 2048, 14336),
    "Gemma 2 27B": (4608, 2048, 36864),
}
# (what the path ends with, index into (out, in), index into the widths).
_SHOWN = (
    (r"self_attn_[qkv]_proj$", 1, 0),
    (r"self_attn_o_proj$", 0, 0),
    (r"self_attn_[kv]_proj$", 0, 1),
    (r"mlp_(gate|up)_proj$", 0, 2),
    (r"mlp_(gate|up)_proj$", 1, 0),
    (r"mlp_down_proj$", 1, 2),
    (r"mlp_down_proj$", 0, 0),
)


def language_models(extents: Mapping[str, Extent | None]) -> tuple[str, ...]:
    """Models whose widths are those that an adapter's layers show; () where they show too little.

    `extents` are by flattened path.
    """
    shown: dict[int, set[int]] = {}
    for expression, side, width in _SHOWN:
        pattern = re.compile(expression)
        for path, extent in extents.items():
            if extent is not None and pattern.search(path):
                shown.setdefault(width, set()).add(extent[side])
    if len(shown) < 2 or any(len(values) > 1 for values in shown.values()):
        return ()
    return tuple(
        model
        for model, widths in _WIDTHS.items()
        if all(widths[width] in values for width, values in shown.items())
    )
