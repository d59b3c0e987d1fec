"""The layers of a model, and how the names of other code pack them.

Our own names are those of diffusers and transformers. The code that a model was published with may
have other ones, and may store q, k and v as rows of one layer or halves of a layer swapped.
"""

from dataclasses import dataclass
from math import prod

OWN, ORIGINAL = "own", "original"
LINEAR, CONV, NORM, EMBEDDING, PARAMETER = "linear", "conv", "norm", "embedding", "parameter"


@dataclass(frozen=True, slots=True)
class Module:
    """One layer with a weight. `kind` is linear, conv, norm, embedding or parameter.

    A parameter is a bare tensor of the model, whose key has no `.weight`.
    """

    kind: str
    shape: tuple[int, ...]  # of the weight: (out, in) or (out, in, *kernel); (n,) of a norm
    has_bias: bool

    @property
    def takes_adapters(self) -> bool:
        """Whether low-rank factors are trained for such a layer; others are replaced whole."""
        return self.kind in (LINEAR, CONV)

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def extent(self) -> tuple[int, int]:
        """(out, in * kernel): the weight as a matrix."""
        return self.shape[0], prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Run:
    """`rows` rows of a layer, from row `begin`, are those of `module` from its row `first`."""

    module: str
    first: int
    begin: int
    rows: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer as one naming packs it; `runs` cover its rows in order and without holes."""

    naming: str
    path: str
    kind: str
    shape: tuple[int, ...]
    has_bias: bool
    runs: tuple[Run, ...]

    @property
    def extent(self) -> tuple[int, int]:
        """(out, in * kernel): the weight as a matrix."""
        return self.shape[0], prod(self.shape[1:])

    @property
    def module(self) -> str | None:
        """The module whose rows these are, all and in order; None for a packed layer."""
        (run, *more) = self.runs
        is_whole = not more and run.first == 0 and run.rows == self.shape[0]
        return run.module if is_whole else None


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows of a module's parameter lie in a checkpoint.

    They are `rows` (begin, end) of the tensor at `key`, or all of it, and the module's from row
    `first`. `is_transposed` says that the file holds the matrix the other way round.
    """

    key: str
    rows: tuple[int, int] | None = None
    first: int = 0
    is_transposed: bool = False


def own_layer(path: str, module: Module) -> Layer:
    """The layer as our own naming has it: one run that is the module itself."""
    run = Run(path, 0, 0, module.shape[0])
    return Layer(OWN, path, module.kind, module.shape, module.has_bias, (run,))


def parameter_key(path: str, kind: str, parameter: str) -> str:
    """The key of a layer's weight or bias; a bare parameter is a weight by its own name."""
    return path if kind == PARAMETER and parameter == "weight" else f"{path}.{parameter}"
