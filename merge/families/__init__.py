"""Families of base models. To add one: its module, its row here, its table by `generate`.

FAMILIES is the explicit table; a family reads its generated list of modules when first asked.
"""

from merge.families.family import Family, Module, Place
from merge.families.sd15 import SD15
from merge.families.sdxl import SDXL
from merge.families.tiny_sd import TINY_SD

__all__ = ["FAMILIES", "Family", "Module", "Place"]

FAMILIES: dict[str, Family] = {family.name: family for family in (SD15, SDXL, TINY_SD)}
