"""Model breadcrumbs: the sum of each change without its smallest and without its largest elements.

Davari & Belilovsky 2023, arXiv:2312.06795: a mask per layer that leaves out the share
gamma of the largest (outliers) and what is smallest. The authors' code
(https://github.com/rezazzr/breadcrumbs at 4a183d6) ranks the elements of every row by themselves;
here the whole layer is ranked, and `density` says what is kept, as in mergekit, whose code keeps nothing of a layer so small that gamma of it rounds to no element.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from merge.method_parameters import Breadcrumbs
from merge.methods.consensus import added, elected, merged
from merge.methods.draws import Draws
from merge.methods.elements import Delta
from merge.methods.thresholds import Cuts, share_of


def merge(deltas: Sequence[Delta], parameters: Breadcrumbs, draws: Draws) -> Delta:
    """What remains of each change, summed or elected as in TIES.

    Of n elements the nearest numbers to density * n are kept and to gamma * n are left out on top;
    where the two add up to more than n, fewer are left out.
    """
    rows, columns = deltas[0].shape
    kept = share_of(parameters.density, rows * columns)
    outliers = min(share_of(parameters.gamma, rows * columns, least=0), rows * columns - kept)
    bounds = [Cuts(delta, [outliers + kept, outliers]) for delta in deltas]

    def sparsify(adapter: int, tile: Tensor, element: int) -> Tensor:
        largest, dropped = (cut.keep(tile, element) for cut in bounds[adapter].get())
        return largest.sub_(dropped)

    combine = partial(elected, combine=parameters.combine) if parameters.elect else added
    return merged(deltas, sparsify, combine, parameters.scale)
