"""Wan 2.1 and 2.2.

The two experts of 2.2 have the shapes of 2.1's text-to-video model; its image-to-video model does
too, with 36 channels, while that of 2.1 attends to an image as well.
"""

from merge.families.dit import dit

_CHANNELS = {"patch_embedding": (16, 32, 36, 48, 52)}  # with a mask, an image, a control video
_HINTS = ("wan",)

WAN_14B = dit(
    "wan-14b",
    "Wan 14B",
    "wan2.1",
    ("wan", "wan_2.1", "wan_2.2_14b"),
    experts=2,
    widths=_CHANNELS,
    hints=(*_HINTS, "wan_2.2_14b"),
    alike="2.1 and both experts of 2.2",
)
WAN_I2V_14B = dit(
    "wan-i2v-14b",
    "Wan 2.1 image-to-video 14B",
    "wan2.1",
    ("wan", "wan_2.1"),
    widths=_CHANNELS,
    hints=_HINTS,
)
WAN_1_3B = dit(
    "wan-1.3b",
    "Wan 2.1 1.3B",
    "wan2.1",
    ("wan", "wan_2.1"),
    widths=_CHANNELS,
    hints=_HINTS,
)
WAN_5B = dit(
    "wan-5b",
    "Wan 2.2 5B",
    "wan2.2",
    ("wan_2.2_5b", "wan"),
    hints=(*_HINTS, "wan_2.2_5b"),
)
