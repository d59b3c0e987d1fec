"""Merge methods: pure tensor functions, one file per method.

To add one: its parameters in merge.method_parameters, its module, its row here and in
merge.methods.rules, its oracle in tests/oracles; `make docs` writes docs/methods.md from the rows.
"""

from dataclasses import dataclass

from merge.method_parameters import Linear, Parameters


@dataclass(frozen=True, slots=True)
class Method:
    """What a reader of docs/methods.md learns about a method."""

    name: str
    summary: str
    exactness: str
    parameters: type[Parameters]
    reference: str


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
    )
}
