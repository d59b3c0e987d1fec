"""Lumina-Image 2.0 and Z-Image, whose code descends from it: the blocks have the same names."""

from merge.families.dit import dit

LUMINA2 = dit("lumina2", "Lumina 2", "lumina-2", hints=("lumina",))
Z_IMAGE = dit(
    "z-image",
    "Z-Image",
    "Z-Image",
    ("z_image", "zimage"),
    hints=("zimage", "z_image", "z-image"),
)
