"""Families of base models. To add one: its module, its row here, its tables by `generate`.

FAMILIES is the explicit table; a family reads its generated list of modules when first asked.
Where a file fits several, the one that stands first here is taken.
"""

from collections.abc import Iterable

from merge.families.family import Family, Layer, Module, Place, Run
from merge.families.flux import CHROMA, FLUX1, FLUX2_DEV, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B
from merge.families.hunyuan_video import HUNYUAN_VIDEO
from merge.families.images import AURAFLOW, PIXART, QWEN_IMAGE, SANA
from merge.families.lumina import LUMINA2, Z_IMAGE
from merge.families.sd2 import SD2
from merge.families.sd3 import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from merge.families.sd15 import SD15
from merge.families.sdxl import SDXL
from merge.families.sdxl_refiner import SDXL_REFINER
from merge.families.tiny_sd import TINY_SD
from merge.families.videos import COGVIDEOX_2B, COGVIDEOX_5B, LTX_2B, LTX_13B, MOCHI
from merge.families.wan import WAN_1_3B, WAN_5B, WAN_14B, WAN_I2V_14B

__all__ = ["FAMILIES", "Family", "Layer", "Module", "Place", "Run", "candidates"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        SD15,
        SDXL,
        SD2,
        SDXL_REFINER,
        FLUX1,
        CHROMA,
        SD3_MEDIUM,
        SD35_MEDIUM,
        SD35_LARGE,
        QWEN_IMAGE,
        Z_IMAGE,
        WAN_14B,
        WAN_I2V_14B,
        WAN_1_3B,
        WAN_5B,
        HUNYUAN_VIDEO,
        FLUX2_DEV,
        FLUX2_KLEIN_9B,
        FLUX2_KLEIN_4B,
        PIXART,
        LUMINA2,
        AURAFLOW,
        SANA,
        LTX_2B,
        LTX_13B,
        COGVIDEOX_2B,
        COGVIDEOX_5B,
        MOCHI,
        TINY_SD,
    )
}


def candidates(paths: Iterable[tuple[str, bool]]) -> tuple[Family, ...]:
    """Families that may name most of `paths`, each with whether its dots are underscores.

    By the first parts of the paths alone, so that the tables of the others need not be unfolded;
    those families that name the most are always among them.
    """
    counts = dict.fromkeys(FAMILIES, 0)
    owners: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        for top in frozenset[str]().union(*(table.tops for table in family.tables.values())):
            owners.setdefault(top, []).append(name)
    n_paths = 0
    for path, is_flat in paths:
        n_paths += 1
        for name in {n for top in _tops(path, is_flat) for n in owners.get(top, ())}:
            counts[name] += 1
    least = min(max(counts.values()), n_paths / 2)
    return tuple(FAMILIES[name] for name, n in counts.items() if n and n >= least)


def _tops(path: str, is_flat: bool) -> list[str]:
    """What may be the first part of a path: a part may hold underscores of its own."""
    if not is_flat:
        return [path.partition(".")[0]]
    ends = [index for index, letter in enumerate(path) if letter == "_"]
    return [path[:end] for end in ends[:_LONGEST_TOP]] + [path]


_LONGEST_TOP = 6
