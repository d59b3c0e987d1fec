"""Adapter algorithms: the mathematics of each, one file per algorithm.

To add one: its row in merge.formats.grammar, its module here, its row below, its oracle in
tests/oracles, its page in docs/formats.
"""

from types import ModuleType

from merge.algorithms import lora

ALGORITHMS: dict[str, ModuleType] = {module.NAME: module for module in (lora,)}
