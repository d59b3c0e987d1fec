"""Video models with a family of their own each: LTX, CogVideoX, Mochi."""

from merge.families.dit import dit
from merge.families.layers import OWN

_LTX = ("ltx",)
_COGVIDEOX = ("cogvideox",)

LTX_2B = dit("ltx-2b", "LTX-Video 2B", "ltx-video", ("ltx",), hints=_LTX)
LTX_13B = dit("ltx-13b", "LTX-Video 13B", "ltx-video", ("ltx",), hints=_LTX)
# The image-to-video models take the image as further channels.
COGVIDEOX_2B = dit(
    "cogvideox-2b",
    "CogVideoX 2B",
    "cogvideox-2b",
    naming=OWN,
    hints=_COGVIDEOX,
)
COGVIDEOX_5B = dit(
    "cogvideox-5b",
    "CogVideoX 5B",
    "cogvideox-5b",
    naming=OWN,
    widths={"patch_embed.proj": (16, 32)},
    hints=_COGVIDEOX,
)
MOCHI = dit("mochi", "Mochi 1", "mochi-1", ("mochi",), hints=("mochi",))
