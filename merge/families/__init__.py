"""Families of base models. To add one: its module, its row here, its tables by `generate`.

FAMILIES is the explicit table; a family reads its generated list of modules when first asked.
Where a file fits several, the one that stands first here is taken.
"""

from collections import Counter
from collections.abc import Iterable

from merge.families.family import Family, Layer, Module, Place, Run
from merge.families.flux import CHROMA, FLUX1, FLUX2_DEV, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B
from merge.families.hunyuan_video import HUNYUAN_VIDEO
from merge.families.images import AURAFLOW, PIXART, QWEN_IMAGE, SANA
from merge.families.lumina import LUMINA2, Z_IMAGE
from merge.families.packing import without_numbers
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
    """Families that may name all of `paths`, each with whether its dots are underscores.

    By the beginnings of the paths alone, so that the tables of the others need not be unfolded.
    Where no family names all, those that name most or at least half.
    """
    owners: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        known = (table.beginnings for table in family.tables.values())
        for beginning in frozenset[str]().union(*known):
            owners.setdefault(beginning, []).append(name)
    kinds = Counter(
        without_numbers(path if is_flat else path.replace(".", "_")) for path, is_flat in paths
    )
    counts: Counter[str] = Counter()
    for kind, n in kinds.items():
        for name in {name for start in _starts(kind) for name in owners.get(start, ())}:
            counts[name] += n
    if not counts:
        return ()
    most, all_of = max(counts.values()), kinds.total()
    least = most if most == all_of else min(most, all_of / 2)
    return tuple(family for name, family in FAMILIES.items() if counts[name] >= least)


_LONGEST_START = 10  # underscores; a part may hold some of its own


def _starts(kind: str) -> list[str]:
    ends = [index for index, letter in enumerate(kind) if letter == "_"]
    return [kind[:end] for end in ends[:_LONGEST_START]] + [kind]
