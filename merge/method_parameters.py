"""What `method:` of a recipe may say: one class for each row of merge.methods, without its mathematics.

`space` is what a method works on, and decides how the engine runs it:

COEFFICIENTS  one number for each adapter, from the inner products of the changes; a linear merge then
CORE          the small cores of the stacked factors (merge.methods.core)
ELEMENTS      every element of the dense change by itself, in tiles of rows
"""

from enum import StrEnum
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Part(BaseModel):
    """What every object of a recipe has in common: strict types, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Space(StrEnum):
    COEFFICIENTS = "coefficients"
    CORE = "core"
    ELEMENTS = "elements"


class Parameters(Part):
    """Of any method. `takes_shares`: strengths say how the adapters share one result and must be
    positive and the same for all of a layer; otherwise each change enters at its strength.
    """

    space: ClassVar[Space]
    takes_shares: ClassVar[bool] = False


Density = Annotated[float, Field(gt=0, le=1, description="share of the elements that are kept")]
Scale = Annotated[
    float, Field(allow_inf_nan=False, description="factor on the result, the paper's lambda")
]
Combine = Annotated[
    Literal["mean", "sum"], Field(description="of what has the elected sign, with `elect`")
]
_ELECT = "then keep what has the elected sign, as TIES, in place of the sum of all"
_ELECT_MEAN = "then the mean of what has the elected sign, as TIES, in place of the sum"


class Linear(Parameters):
    """The weighted sum of the deltas."""

    space: ClassVar = Space.COEFFICIENTS
    name: Literal["linear"] = "linear"
    normalise: Literal["strengths", "energy"] | None = Field(
        None,
        description="strengths: divide by the sum of their magnitudes; energy: scale every layer to "
        "the energy that its changes have apart",
    )


class Slerp(Parameters):
    """Of two adapters. Strengths are shares: 0.7 and 0.3 lean to the first, as 7 and 3 do."""

    space: ClassVar = Space.COEFFICIENTS
    takes_shares: ClassVar = True
    name: Literal["slerp"]


class Karcher(Parameters):
    """Of any number of adapters. Strengths are shares."""

    space: ClassVar = Space.COEFFICIENTS
    takes_shares: ClassVar = True
    name: Literal["karcher"]


class ModelStock(Parameters):
    space: ClassVar = Space.COEFFICIENTS
    name: Literal["model_stock"]
    least: float = Field(
        0.0,
        ge=0,
        le=1,
        description="least share of the average that stays, where the adapters hardly agree",
    )


class Svc(Parameters):
    space: ClassVar = Space.CORE
    name: Literal["svc"]
    floor: float = Field(
        1.0,
        gt=0,
        le=1,
        description="least times that a change counts as found in the sum, the paper's alpha; "
        "below 1 what only some adapters have is raised too",
    )


class Cart(Parameters):
    """Differs from the average for three adapters and more."""

    space: ClassVar = Space.CORE
    name: Literal["cart"]
    keep: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of the rank that is kept of what an adapter has beyond the average",
    )
    scale: float = Field(
        1.0,
        allow_inf_nan=False,
        description="factor on what the adapters have beyond the average, the paper's lambda",
    )


class Tsv(Parameters):
    space: ClassVar = Space.CORE
    name: Literal["tsv"]
    keep: float = Field(1.0, gt=0, le=1, description="share of each adapter's rank that is kept")
    scale: Scale = 1.0


class IsoC(Parameters):
    space: ClassVar = Space.CORE
    name: Literal["iso_c"]
    scale: Scale = 1.0


class IsoCts(Parameters):
    space: ClassVar = Space.CORE
    name: Literal["iso_cts"]
    common: float = Field(0.8, ge=0, le=1, description="share of the rank for what is common")
    scale: Scale = 1.0


class Ctm(Parameters):
    space: ClassVar = Space.CORE
    name: Literal["ctm"]
    rank: int | None = Field(
        None,
        ge=1,
        description="of the shared basis; the largest rank of the inputs where none is said",
    )
    balance: float = Field(
        1.0,
        ge=0,
        le=1,
        description="how alike the adapters count for the choice of the basis, the paper's 1 - "
        "beta; 0: by the energy of their changes",
    )


class KnotsTies(Parameters):
    space: ClassVar = Space.CORE
    name: Literal["knots_ties"]
    density: Density = 0.2
    scale: Scale = 1.0


class KnotsDare(Parameters):
    space: ClassVar = Space.CORE
    name: Literal["knots_dare"]
    density: Density = 0.5
    elect: bool = Field(False, description=_ELECT_MEAN)
    scale: Scale = 1.0


class CoreTies(Parameters):
    space: ClassVar = Space.CORE
    name: Literal["core_ties"]
    density: Density = 0.2
    scale: Scale = 1.0


class CoreDare(Parameters):
    space: ClassVar = Space.CORE
    name: Literal["core_dare"]
    density: Density = 0.5
    elect: bool = Field(False, description=_ELECT_MEAN)
    scale: Scale = 1.0


class Ties(Parameters):
    space: ClassVar = Space.ELEMENTS
    name: Literal["ties"]
    density: Density = 0.2
    vote: Literal["mass", "count"] = Field(
        "mass", description="the sign of the sum of the values is elected, or the most frequent one"
    )
    combine: Literal["mean", "sum"] = Field(
        "mean", description="of what has the elected sign; the mean is of as many as agree"
    )
    scale: Scale = 1.0


class Dare(Parameters):
    space: ClassVar = Space.ELEMENTS
    name: Literal["dare"]
    density: Density = 0.5
    elect: bool = Field(False, description=_ELECT)
    combine: Combine = "mean"
    scale: Scale = 1.0


class Della(Parameters):
    space: ClassVar = Space.ELEMENTS
    name: Literal["della"]
    density: Density = 0.5
    epsilon: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="from the smallest to the largest element of a row, the probability to be kept "
        "grows from density - epsilon to density + epsilon",
    )
    elect: bool = Field(True, description=_ELECT)
    combine: Combine = "mean"
    scale: Scale = 1.0

    @model_validator(mode="after")
    def _are_probabilities(self) -> Self:
        if not 0 < self.density - self.epsilon <= self.density + self.epsilon <= 1:
            raise ValueError("density - epsilon must be above 0 and density + epsilon at most 1")
        return self


class Magnitude(Parameters):
    space: ClassVar = Space.ELEMENTS
    name: Literal["magnitude"]
    density: Density = 0.5
    scale: Scale = 1.0


class Breadcrumbs(Parameters):
    space: ClassVar = Space.ELEMENTS
    name: Literal["breadcrumbs"]
    density: Density = 0.9
    gamma: float = Field(
        0.01, ge=0, lt=1, description="share of the largest elements that is dropped"
    )
    elect: bool = Field(False, description=_ELECT)
    combine: Combine = "mean"
    scale: Scale = 1.0

    @model_validator(mode="after")
    def _fits_into_all(self) -> Self:
        if self.density + self.gamma > 1:
            raise ValueError("density + gamma must be at most 1: what is dropped is not kept")
        return self


Method = Annotated[
    Linear
    | Slerp
    | Karcher
    | ModelStock
    | Svc
    | Cart
    | Tsv
    | IsoC
    | IsoCts
    | Ctm
    | KnotsTies
    | KnotsDare
    | CoreTies
    | CoreDare
    | Ties
    | Dare
    | Della
    | Magnitude
    | Breadcrumbs,
    Field(discriminator="name"),
]
