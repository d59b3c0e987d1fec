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

    `when`: what it is for, and what it is not for, in sentences. `deviation`: where the result is
    not that of the published code, and why.
    """

    name: str
    summary: str
    exactness: str
    parameters: type[Parameters]
    reference: str
    deviation: str = ""
    when: tuple[str, ...] = ()


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
    "Exact, in factors of the adapters' ranks together. Directions of equal strength have no basis "
    "of their own, and which one is chosen shows in the result: the same on one machine, not always "
    "on another."
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
            "decomposition of all changes gives. Unlike ties it stays an adapter of the summed "
            "ranks.",
            exactness=_ALIGNED,
            parameters=KnotsTies,
            when=(
                (
                    "Try it where `ties` is what you want and an adapter is what you need: nothing of "
                    "the vote is lost to a rank."
                ),
                (
                    "It finds agreement between adapters that write to the same output directions by "
                    "different inputs; `core_ties` asks for agreement in both."
                ),
                (
                    "Two random adapters of rank 16 keep a cosine of 0.79 with their sum, at 0.79 of "
                    "its norm; a higher `density` comes closer to the mean."
                ),
                (
                    "The rank is that of the adapters together, so say a lower one if the file must be"
                    " small."
                ),
            ),
            reference="Stoica et al. 2024, https://arxiv.org/abs/2410.19735",
            deviation="Every layer is trimmed by itself, not the model as a whole; a vote without a "
            "winner keeps nothing, as in ties.",
        ),
        Method(
            name="knots_dare",
            summary="DARE in the same shared output directions.",
            exactness=_ALIGNED,
            parameters=KnotsDare,
            when=(
                (
                    "It thins out each adapter within the shared directions, so fewer of their "
                    "elements meet."
                ),
                "At the density of 0.5 the noise is as large as the change; 0.8 brings it to half.",
                "Another `seed` gives another result: look at a few before you judge the method.",
            ),
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
            when=(
                (
                    "It is the cheapest way to a vote, for it sees matrices no larger than the ranks "
                    "together."
                ),
                (
                    "Adapters of one subject, which share directions, have something to vote on; "
                    "between unrelated ones there is little to agree or disagree about, and it drops "
                    "what is weak."
                ),
                (
                    "With few elements to choose from, a low `density` is coarse: of one adapter of "
                    "rank 4, 0.2 keeps three of sixteen elements."
                ),
            ),
            reference="Panariello et al. 2025, https://arxiv.org/abs/2509.17786",
            deviation=_EVEN,
        ),
        Method(
            name="core_dare",
            summary="DARE on the same small matrices.",
            exactness=_ALIGNED,
            parameters=CoreDare,
            when=(
                "As `knots_dare`, on smaller matrices.",
                (
                    "It drops whole connections between an input and an output direction rather than "
                    "single elements of the weight, so its noise stays within the adapters' own "
                    "directions."
                ),
            ),
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
            when=(
                (
                    "For a bake of three or more adapters that pull the same weights in opposite "
                    "directions."
                ),
                (
                    "With two adapters there is no majority: the larger change wins wherever they "
                    "disagree."
                ),
                (
                    "For an adapter it is hardly worth it: two random ones of rank 16, pressed back into "
                    "rank 32, come out with a cosine of 0.94 with their plain sum, against 0.79 "
                    "before; `knots_ties` and `core_ties` lose nothing so."
                ),
                (
                    "A mean is weaker than a sum: raise `scale`, or say `combine: sum`, where the "
                    "result is too faint."
                ),
                (
                    "Every layer's change is computed three times, so a bake takes several times as "
                    "long as a linear one."
                ),
            ),
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
            when=(
                (
                    "Made for the changes of full fine-tuning, whose elements are many and tiny; of a "
                    "LoRA, dropping half of the elements costs as much noise as there is change."
                ),
                "Densities of 0.8 and more keep the noise at half of the change or less.",
                (
                    "For an adapter it is linear plus noise: two random ones of rank 16, pressed back "
                    "into rank 32, come out with a cosine of 0.95 with their plain sum."
                ),
                "Another `seed` gives another result: look at a few before you judge the method.",
            ),
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
            when=(
                (
                    "It spares what is large in each row, so it disturbs less than `dare` at the same "
                    "density."
                ),
                (
                    "An `epsilon` close to `density` keeps nearly everything large and nearly nothing "
                    "small, but divides what is kept of the small by a small number."
                ),
                "It sorts every row, and takes the longest of the element-wise methods.",
                "For an adapter the same holds as for `dare`.",
            ),
            reference="Deep et al. 2024, https://arxiv.org/abs/2406.11617",
            deviation="`epsilon` is half the paper's. A row of one element has the density as its "
            "probability, where the authors' code divides by zero. mergekit rescales as for dare.",
        ),
        Method(
            name="magnitude",
            summary="The sum of the largest elements of each change.",
            exactness=_ELEMENTS,
            parameters=Magnitude,
            when=(
                (
                    "It shows how much of an adapter sits in its largest elements: half of them have a"
                    " cosine of 0.97 with the whole, for random factors of rank 16."
                ),
                (
                    "Nothing is rescaled and nothing votes, so it is the gentlest of these methods, "
                    "and the closest to linear."
                ),
                "A weight that no adapter changes much stays as the base has it.",
            ),
            reference="Han et al. 2015, https://arxiv.org/abs/1506.02626 (of weights); PEFT 0.21.2, "
            "https://github.com/huggingface/peft, `magnitude_prune` (of changes)",
        ),
        Method(
            name="breadcrumbs",
            summary="The sum of each change without its smallest elements and without its few "
            "largest, which are taken for outliers.",
            exactness=_ELEMENTS,
            parameters=Breadcrumbs,
            when=(
                "For adapters with a few extreme elements that spoil a bake.",
                (
                    "With the defaults it is close to linear: a cosine of 0.95 with the sum of two "
                    "random adapters."
                ),
                (
                    "What is largest may be what the adapter has learned, so compare with `gamma: 0` "
                    "before you keep it."
                ),
            ),
            reference="Davari & Belilovsky 2023, https://arxiv.org/abs/2312.06795",
            deviation="`density` is the share that is kept, as in mergekit, and `gamma` the share that is "
            "dropped on top; what else is dropped is the smallest. Elements are ranked within a layer, "
            "as in mergekit, where the authors' code ranks those of every row by themselves. "
            "mergekit keeps nothing of a layer so small that gamma of it rounds to no element.",
        ),
    )
}
