"""Families of base models. To add one: its module, its row here, its tables by `generate`.

FAMILIES is the explicit table; a family reads its generated list of modules when first asked.
"""

from merge.families.family import Family, Layer, Module, Place, Run
from merge.families.sd15 import SD15
from merge.families.sdxl import SDXL
from merge.families.tiny_sd import TINY_SD

__all__ = ["FAMILIES", "Family", "Layer", "Module", "Place", "Run"]

FAMILIES: dict[str, Family] = {family.name: family for family in (SD15, SDXL, TINY_SD)}
