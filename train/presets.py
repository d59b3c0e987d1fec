"""Which layers of an SD-like UNet get an adapter. No torch here: the command line lists them."""

from dataclasses import dataclass

_BLOCK = r"(down_blocks|mid_block|up_blocks)\..*"


@dataclass(frozen=True, slots=True)
class Preset:
    """`pattern` matches whole module paths; convolutions are left out unless asked for.

    `sd15_rank8` is how many parameters it trains on Stable Diffusion 1.5 at rank 8.
    """

    pattern: str
    convolutions: bool
    layers: str
    good_for: str
    sd15_rank8: int


PRESETS: dict[str, Preset] = {
    "xattn-kv": Preset(
        rf"{_BLOCK}attn2\.(to_k|to_v)",
        False,
        "keys and values of cross-attention",
        "the smallest file: colours and looks that words already nearly describe",
        396_288,
    ),
    "xattn": Preset(
        rf"{_BLOCK}attn2\.(to_q|to_k|to_v|to_out\.0)",
        False,
        "cross-attention",
        "styles in small files",
        795_648,
    ),
    "attn": Preset(
        rf"{_BLOCK}attn[12]\.(to_q|to_k|to_v|to_out\.0)",
        False,
        "self- and cross-attention",
        "styles; what diffusers' example scripts train",
        1_594_368,
    ),
    "attn+ff": Preset(
        rf"{_BLOCK}(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))",
        False,
        "attention and feed-forward",
        "styles with detail, simple concepts",
        2_992_128,
    ),
    "all-linear": Preset(
        _BLOCK,
        False,
        "every linear layer of the blocks",
        "concepts",
        3_378_688,
    ),
    "all+conv": Preset(
        _BLOCK,
        True,
        "every linear and convolution layer of the blocks",
        "new shapes and textures; the largest file",
        8_406_528,
    ),
}
