"""TIES: trim each change, elect one sign for each element, combine what agrees.

Yadav et al. 2023, arXiv:2306.01708, algorithm 1. The paper trims over all parameters of a model
together and adds the result times lambda; here every layer is trimmed by itself, as PEFT and mergekit
do, and changes enter at their strengths.
"""

from collections.abc import Sequence
from functools import partial

from merge.method_parameters import Ties
from merge.methods.consensus import elected, merged
from merge.methods.draws import Draws
from merge.methods.elements import Delta
from merge.methods.thresholds import trimmed


def merge(deltas: Sequence[Delta], parameters: Ties, draws: Draws) -> Delta:
    """The largest `density` of each change, then the mean or sum of those with the elected sign."""
    combine = partial(elected, vote=parameters.vote, combine=parameters.combine)
    return merged(deltas, trimmed(deltas, parameters.density), combine, parameters.scale)
