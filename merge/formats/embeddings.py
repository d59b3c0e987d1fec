"""Files of word vectors (textual inversion), in every layout that tools write."""

from collections.abc import Mapping

from merge.formats.header import TensorInfo

# How wide the vectors of a family with one text encoder are.
WIDTHS: Mapping[int, tuple[str, ...]] = {768: ("sd15",), 1024: ("sd2",), 1280: ("sdxl-refiner",)}
_KEYS = {
    *("emb_params", "clip_l", "clip_g", "t5xxl", "t5"),
    *("clip_l_out", "clip_g_out", "t5_out"),
}


def is_embedding(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether these are word vectors and nothing else."""
    names = set(tensors)
    if all(name.startswith("string_to_param.") for name in names):
        return True
    if names <= _KEYS or names == {"text_encoders_0", "text_encoders_1"}:
        return True
    # diffusers: the token's own text is the key, and a long one has token_1, token_2, …
    return len(names) <= 64 and all(
        len(info.shape) in (1, 2) and info.shape[-1] in WIDTHS and "." not in key
        for key, info in tensors.items()
    )
