"""Merge methods: pure tensor functions, one file per method.

To add one: its parameters in merge.method_parameters, its module, its row here and in
merge.methods.rules, its oracle in tests/oracles; `make docs` writes docs/methods.md from the rows.
"""

from dataclasses import dataclass

from merge.method_parameters import (
    Breadcrumbs,
    Cart,
    CoreDare,
    CoreTies,
    Ctm,
    Dare,
    Della,
    IsoC,
    IsoCts,
    Karcher,
    KnotsDare,
    KnotsTies,
    Linear,
    Magnitude,
    ModelStock,
    Parameters,
    Slerp,
    Svc,
    Ties,
    Tsv,
)


@dataclass(frozen=True, slots=True)
class Method:
    """What a reader of docs/methods.md learns about a method.

    `deviation`: where the result is not that of the published code, and why.
    """

    name: str
    summary: str
    exactness: str
    parameters: type[Parameters]
    reference: str
    deviation: str = ""


_LINEAR = (
    "One factor for each adapter and layer, from the inner products of the changes; then linear."
)
_CORE = "Exact in the adapters' span, computed on cores as small as their ranks."
_SPAN = (
    "The published code averages over all min(out, in) singular values and so makes directions as "
    "strong as others that no adapter has; here only those of the adapters' span count. The "
    "strengths of papers do not carry over."
)
_ELEMENTS = (
    "Exact where it is baked. The result has full rank, and the nearest adapter of a rank near the "
    "inputs' is close to their plain sum again: the certificate says what was lost."
)
_ALIGNED = (
    "Exact in the adapters' span. Directions of equal strength have no basis of their own, and which "
    "one is chosen shows in the result: the same on one machine, not always on another."
)
_EVEN = (
    "The published code takes the directions from the factors as they are stored, so the same change "
    "in other factors gives another result; here every change is first split evenly between both of "
    "its factors. A vote without a winner keeps nothing, as in ties."
)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="linear",
            summary="The sum of the adapters' changes, each times its strength.",
            exactness="Exact by concatenation (ranks add up), or the nearest result of the asked "
            "rank, energy or size; the error is in the certificate.",
            parameters=Linear,
            reference="Hu et al. 2021, https://arxiv.org/abs/2106.09685 (the change); Eckart & "
            "Young 1936, https://doi.org/10.1007/BF02288367 (the nearest lower rank)",
        ),
        Method(
            name="slerp",
            summary="The point on the arc between two changes, at the share of the second; it keeps "
            "the norm that a straight line between unrelated changes loses.",
            exactness=_LINEAR,
            parameters=Slerp,
            reference="Shoemake 1985, https://doi.org/10.1145/325165.325242",
        ),
        Method(
            name="karcher",
            summary="The centre of the changes' directions on the sphere, by shares, with their mean "
            "norm: slerp for any number of adapters.",
            exactness=_LINEAR,
            parameters=Karcher,
            reference="Karcher 1977, https://doi.org/10.1002/cpa.3160300502; Buss & Fillmore 2001, "
            "https://doi.org/10.1145/502122.502124 (the iteration)",
        ),
        Method(
            name="model_stock",
            summary="The average, shortened by how little the changes agree: for several adapters of "
            "one subject. Of unrelated adapters it leaves almost nothing, unless `least` says so; "
            "the certificate has the factor of every layer.",
            exactness=_LINEAR,
            parameters=ModelStock,
            reference="Jang et al. 2024, https://arxiv.org/abs/2403.19522",
            deviation="A negative mean cosine counts as 0, where the formula would turn the result "
            "around or divide by 0.",
        ),
        Method(
            name="svc",
            summary="The sum, in which a direction that several adapters share counts once.",
            exactness=_CORE,
            parameters=Svc,
            reference="Li et al. 2026, https://arxiv.org/abs/2602.05536",
            deviation="The published code sums at 0.3; here changes enter at their strengths. An "
            "adapter's answer below 1e-5 of its norm is nothing, where rounding would otherwise "
            "erase the direction.",
        ),
        Method(
            name="cart",
            summary="The average, plus the strongest part of what each adapter has beyond it. With "
            "two adapters it is the average: what they have beyond it cancels.",
            exactness=_CORE,
            parameters=Cart,
            reference="Choi et al. 2024, https://arxiv.org/abs/2412.12153",
            deviation="`keep` is a share of the rank that a change has and not of the layer's side.",
        ),
        Method(
            name="tsv",
            summary="Every adapter keeps the strengths of its directions, and the directions of all "
            "are made orthogonal to each other; what adapters share is averaged.",
            exactness=_CORE,
            parameters=Tsv,
            reference="Gargiulo et al. 2025, https://arxiv.org/abs/2412.00081",
            deviation="The published code keeps min(out, in) / N directions of each adapter. Above "
            "its rank those are arbitrary vectors, which turn the result; here `keep` is a share of "
            "the rank.",
        ),
        Method(
            name="iso_c",
            summary="The sum with all its singular values made equal: weak directions count as much "
            "as strong ones.",
            exactness=_CORE,
            parameters=IsoC,
            reference="Marczak et al. 2025, https://arxiv.org/abs/2502.04959",
            deviation=_SPAN,
        ),
        Method(
            name="iso_cts",
            summary="As iso_c, with room for directions that only one adapter has.",
            exactness=_CORE,
            parameters=IsoCts,
            reference="Marczak et al. 2025, https://arxiv.org/abs/2502.04959, algorithm 1",
            deviation=_SPAN,
        ),
        Method(
            name="ctm",
            summary="All adapters in one shared basis of low rank, summed there: the rank is chosen "
            "before the merge and not after it.",
            exactness=_CORE + " What the basis leaves out is the method's doing and no truncation: "
            "the certificate's errors start from there.",
            parameters=Ctm,
            reference="He et al. 2026, https://arxiv.org/abs/2606.03723",
            deviation="Of the rules that the paper merges by inside of the basis, the sum.",
        ),
        Method(
            name="knots_ties",
            summary="TIES on what each adapter sends into output directions that all share, which one "
            "decomposition of all changes gives. Unlike ties it stays an adapter of the summed ranks.",
            exactness=_ALIGNED,
            parameters=KnotsTies,
            reference="Stoica et al. 2024, https://arxiv.org/abs/2410.19735",
            deviation="Every layer is trimmed by itself, not the model as a whole; a vote without a "
            "winner keeps nothing, as in ties.",
        ),
        Method(
            name="knots_dare",
            summary="DARE in the same shared output directions.",
            exactness=_ALIGNED,
            parameters=KnotsDare,
            reference="Stoica et al. 2024, https://arxiv.org/abs/2410.19735",
            deviation="What is drawn depends on the seed, the layer, the adapter's bytes and the "
            "element alone.",
        ),
        Method(
            name="core_ties",
            summary="TIES on small matrices that say how each adapter connects input to output "
            "directions which all share: the cheapest of its kind.",
            exactness=_ALIGNED,
            parameters=CoreTies,
            reference="Panariello et al. 2025, https://arxiv.org/abs/2509.17786",
            deviation=_EVEN,
        ),
        Method(
            name="core_dare",
            summary="DARE on the same small matrices.",
            exactness=_ALIGNED,
            parameters=CoreDare,
            reference="Panariello et al. 2025, https://arxiv.org/abs/2509.17786",
            deviation=_EVEN,
        ),
        Method(
            name="ties",
            summary="Keeps the largest elements of each change, lets them elect a sign for every "
            "element, and takes the mean of those that agree: for several adapters whose changes "
            "undo each other in a sum.",
            exactness=_ELEMENTS,
            parameters=Ties,
            reference="Yadav et al. 2023, https://arxiv.org/abs/2306.01708, algorithm 1",
            deviation="Every layer is trimmed by itself, not the model as a whole, and exactly as many "
            "elements are kept as the density says. A vote without a winner keeps nothing, as the "
            "paper's formula says, where its authors' code, PEFT and mergekit choose a sign. Changes "
            "vote at their strengths; PEFT lets them vote before.",
        ),
        Method(
            name="dare",
            summary="Drops elements at random and enlarges the rest, so that the expectation is the "
            "sum: fewer elements of different changes meet, for a noise of sqrt(1 / density - 1) "
            "times the change.",
            exactness=_ELEMENTS,
            parameters=Dare,
            reference="Yu et al. 2023, https://arxiv.org/abs/2311.03099",
            deviation="What is drawn depends on the seed, the layer, the adapter's bytes and the "
            "element alone, so an adapter and its opposite cancel. mergekit rescales each draw to "
            "the sum of magnitudes before it.",
        ),
        Method(
            name="della",
            summary="As dare, but the larger an element is within its row, the likelier it stays; "
            "then a vote as in ties.",
            exactness=_ELEMENTS,
            parameters=Della,
            reference="Deep et al. 2024, https://arxiv.org/abs/2406.11617",
            deviation="`epsilon` is half the paper's. A row of one element has the density as its "
            "probability, where the authors' code divides by zero. mergekit rescales as for dare.",
        ),
        Method(
            name="magnitude",
            summary="The sum of the largest elements of each change.",
            exactness=_ELEMENTS,
            parameters=Magnitude,
            reference="Han et al. 2015, https://arxiv.org/abs/1506.02626 (of weights); PEFT 0.21.2, "
            "https://github.com/huggingface/peft, `magnitude_prune` (of changes)",
        ),
        Method(
            name="breadcrumbs",
            summary="The sum of each change without its smallest elements and without its few "
            "largest, which are taken for outliers.",
            exactness=_ELEMENTS,
            parameters=Breadcrumbs,
            reference="Davari & Belilovsky 2023, https://arxiv.org/abs/2312.06795",
            deviation="`density` is the share that is kept, as in mergekit, and `gamma` the share that is "
            "dropped on top; what else is dropped is the smallest. mergekit keeps nothing of a layer "
            "so small that gamma of it rounds to no element.",
        ),
    )
}
