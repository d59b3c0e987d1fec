"""graft extract, resize, whatis: adapters out of checkpoints, smaller ones, and which one it was."""

from typing import Annotated, Any

import typer

from cli.arguments import as_typed, make_recipe
from cli.console import WrongUsage
from cli.merge import AsJSON, Force, Only, Out, Reproducible, SaveRecipe, run

Rank = Annotated[int | None, typer.Option(help="The nearest result of this rank in every layer.")]
Energy = Annotated[
    float | None,
    typer.Option(help="Keep this share of each layer's squared norm, at the least ranks."),
]
Budget = Annotated[
    int | None, typer.Option(metavar="BYTES", help="The best ranks within so many bytes.")
]
Shared = Annotated[
    int | None,
    typer.Option(metavar="RANK", help="As many numbers as this rank, shared over all layers."),
]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="keep, float16, bfloat16 or float32.")]
Dialect = Annotated[
    str | None,
    typer.Option("--to", metavar="DIALECT", help="kohya, diffusers, comfy or peft (a folder)."),
]


def register(app: typer.Typer) -> None:
    app.command()(extract)
    app.command()(resize)


def extract(
    tuned: Annotated[
        str,
        typer.Argument(
            metavar="TUNED",
            show_default=False,
            help="The checkpoint that was trained, a file or a folder, named as adapters are.",
        ),
    ],
    base: Annotated[
        str,
        typer.Argument(metavar="BASE", show_default=False, help="What it was trained from."),
    ],
    to: Out,
    rank: Rank = None,
    energy: Energy = None,
    budget: Budget = None,
    shared: Shared = None,
    only: Only = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="What is not compared, by name, as in 'vae.*'."),
    ] = None,
    dtype: Dtype = "keep",
    dialect: Dialect = None,
    reproducible: Reproducible = False,
    save_recipe: SaveRecipe = None,
    force: Force = False,
    as_json: AsJSON = False,
) -> None:
    """Make an adapter of what training changed: graft extract TUNED BASE --rank 32 -o OUT.

    The two may be in different layouts and dtypes. What an adapter cannot hold is refused by name.
    """
    recipe = make_recipe(
        {
            "kind": "extract",
            "base": {"ref": base},
            "tuned": {"ref": tuned, "only": only or [], "leave_out": leave_out or []},
            "rank": _rank(rank, energy, budget, shared),
            "output": {"dialect": dialect, "dtype": dtype},
            "numerics": "reproducible" if reproducible else "fast",
        },
        (),
    )
    with as_typed(()):
        run(recipe, to, force=force, save_recipe=save_recipe, as_json=as_json)


def resize(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="REF", show_default=False, help="The adapter, named as in graft merge."
        ),
    ],
    to: Out,
    rank: Rank = None,
    energy: Energy = None,
    budget: Budget = None,
    shared: Shared = None,
    dtype: Dtype = "keep",
    dialect: Dialect = None,
    reproducible: Reproducible = False,
    save_recipe: SaveRecipe = None,
    force: Force = False,
    as_json: AsJSON = False,
) -> None:
    """Make an adapter smaller at the least loss, and say what was lost: graft resize REF --rank 8 -o OUT.

    Dialect, dtype, trigger words and the facts of the training stay.
    """
    recipe = make_recipe(
        {
            "kind": "resize",
            "inputs": [{"ref": adapter}],
            "rank": _rank(rank, energy, budget, shared),
            "output": {"dialect": dialect, "dtype": dtype},
            "numerics": "reproducible" if reproducible else "fast",
        },
        (adapter,),
    )
    with as_typed((adapter,)):
        run(recipe, to, force=force, save_recipe=save_recipe, as_json=as_json)


def _rank(
    rank: int | None, energy: float | None, budget: int | None, shared: int | None
) -> dict[str, Any]:
    ranks = {"fixed": rank, "energy": energy, "budget_bytes": budget, "shared": shared}
    said = {name: value for name, value in ranks.items() if value is not None}
    if len(said) != 1:
        raise WrongUsage("say how large: one of --rank, --energy, --budget and --shared")
    return said
