"""Magnitude pruning: the sum of what is largest in each change.

Han et al. 2015, arXiv:1506.02626, prune weights so; PEFT's `magnitude_prune` does it to changes.
"""

from collections.abc import Sequence

from merge.method_parameters import Magnitude
from merge.methods.consensus import added, merged
from merge.methods.draws import Draws
from merge.methods.elements import Delta
from merge.methods.thresholds import trimmed


def merge(deltas: Sequence[Delta], parameters: Magnitude, draws: Draws) -> Delta:
    """The sum of the largest `density` of each change."""
    return merged(deltas, trimmed(deltas, parameters.density), added, parameters.scale)
