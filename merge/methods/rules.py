"""Which function computes a method. Rows of merge.methods say what each does, for people.

A method of COEFFICIENTS is given the inner products of the changes at strength 1 and their strengths,
and gives the coefficients of a linear merge. One of the CORE is given the changes at their strengths
and gives the spectrum of the result. One of ELEMENTS is given the changes at their strengths as
rows that can be asked for, and gives the result as the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from merge.methods import (
    breadcrumbs,
    cart,
    core_space,
    ctm,
    dare,
    della,
    iso,
    karcher,
    knots,
    linear,
    magnitude,
    model_stock,
    slerp,
    svc,
    ties,
    tsv,
)
from merge.methods.core import Core
from merge.methods.draws import Draws
from merge.methods.elements import Delta
from merge.methods.linear import Spectrum

Coefficients = Callable[[Float[Tensor, "n n"], Sequence[float], Any], list[float]]
OnCore = Callable[[Core, Any, Draws], Spectrum]
OnElements = Callable[[Sequence[Delta], Any, Draws], Delta]

COEFFICIENTS: Mapping[str, Coefficients] = {
    "linear": linear.coefficients,
    "slerp": slerp.coefficients,
    "karcher": karcher.coefficients,
    "model_stock": model_stock.coefficients,
}
CORE: Mapping[str, OnCore] = {
    "svc": svc.merge,
    "cart": cart.merge,
    "tsv": tsv.merge,
    "iso_c": iso.merge_common,
    "iso_cts": iso.merge_common_and_specific,
    "ctm": ctm.merge,
    "knots_ties": knots.merge_ties,
    "knots_dare": knots.merge_dare,
    "core_ties": core_space.merge_ties,
    "core_dare": core_space.merge_dare,
}
ELEMENTS: Mapping[str, OnElements] = {
    "ties": ties.merge,
    "dare": dare.merge,
    "della": della.merge,
    "magnitude": magnitude.merge,
    "breadcrumbs": breadcrumbs.merge,
}
