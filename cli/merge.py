"""graft merge and bake: wishes on the command line, results with their certificate."""

import importlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from cli.arguments import as_typed, is_typed, make_recipe
from cli.auto import filled_in
from cli.console import (
    CommandError,
    WrongUsage,
    byte_progress,
    count_progress,
    err,
    out,
    plain,
    print_json,
)
from cli.ranges import Blocks as RemoteBlocks
from cli.refs import open_source, parse_weighted, path_of, place_of
from cli.texts import write_text
from cli.trees import as_yaml

if TYPE_CHECKING:
    from merge.execute import Outcome
    from merge.formats.sources import File
    from merge.formats.targets import Target
    from merge.plan import Plan
    from merge.recipe import Recipe

    Gather = Callable[[Recipe, RemoteBlocks], Mapping[str, File]]

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="REF=STRENGTH…",
        show_default=False,
        help="Adapters, each with its strength (1 if none is said): paths, "
        "namespace/name[@revision][:file] on the hub, hf://, s3:// or https://.",
    ),
]
Out = Annotated[
    str, typer.Option("--out", "-o", help="The file or folder to write, or s3://bucket/key.")
]
Force = Annotated[
    bool, typer.Option("--force", "-f", help="Replace a file or an object that is there.")
]
Blocks = Annotated[
    list[str] | None,
    typer.Option(
        "--block",
        metavar="GLOB=FACTOR",
        help="Multiply the strength of modules, as in '*.up_blocks.*=0.5'; repeat it for more.",
    ),
]
Components = Annotated[
    list[str] | None,
    typer.Option(
        "--component",
        metavar="NAME=STRENGTH",
        help="A component's own strength, as in text_encoder=0.4.",
    ),
]
LeaveOut = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Modules to leave out, by name.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Modules to keep: all others are left out."),
]
Vectors = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REF=FILE", help="Strengths of an adapter's directions, rows or columns (ZipLoRA)."
    ),
]
StyleContent = Annotated[
    bool,
    typer.Option(
        "--style-content",
        help="The style of the first adapter on the content of the second: B-LoRA's blocks of SDXL.",
    ),
]
MethodName = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="How changes become one: linear, svc, ties …; docs/methods.md has all."
    ),
]
MethodParameters = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        metavar="NAME=VALUE",
        help="A parameter of the method, as in density=0.3; repeat it for more.",
    ),
]
Normalise = Annotated[
    str | None,
    typer.Option(metavar="BY", help="Of a linear merge: by the strengths or the energy."),
]
Seed = Annotated[int, typer.Option(help="For methods that draw random numbers.")]
Reproducible = Annotated[
    bool, typer.Option("--reproducible", help="The same bytes for any number of threads.")
]
SaveRecipe = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the pinned recipe as YAML.")
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def register(app: typer.Typer) -> None:
    app.command()(merge)
    app.command()(bake)


def merge(
    context: typer.Context,
    inputs: Inputs,
    to: Out,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto",
            help="Take what `graft report` suggests for all that is not said, and say why.",
        ),
    ] = False,
    method: MethodName = "linear",
    param: MethodParameters = None,
    normalise: Normalise = None,
    rank: Annotated[int | None, typer.Option(help="The best result of this rank.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep this share of each module's squared norm.")
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(metavar="BYTES", help="The best ranks whose tensors fit in so many bytes."),
    ] = None,
    shared: Annotated[
        int | None,
        typer.Option(metavar="RANK", help="As many numbers as this rank, shared over all layers."),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Ranks add up; the default.")] = False,
    block: Blocks = None,
    component: Components = None,
    leave_out: LeaveOut = None,
    only: Only = None,
    vectors: Vectors = None,
    style_content: StyleContent = False,
    base: Annotated[
        str | None,
        typer.Option(metavar="REF", help="The base that changes depend on, as those of DoRA do."),
    ] = None,
    seed: Seed = 0,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="keep, float16, bfloat16 or float32.")
    ] = "keep",
    dialect: Annotated[
        str | None,
        typer.Option("--to", metavar="DIALECT", help="kohya, diffusers, comfy or peft (a folder)."),
    ] = None,
    reproducible: Reproducible = False,
    save_recipe: SaveRecipe = None,
    force: Force = False,
    as_json: AsJSON = False,
) -> None:
    """Combine adapters into one: graft merge ink.safetensors=0.7 robot.safetensors=0.5 -o OUT."""
    ranks = {"fixed": rank, "energy": energy, "budget_bytes": budget, "shared": shared}
    said = {name: value for name, value in ranks.items() if value is not None}
    said |= {"exact": True} if exact else {}
    if len(said) > 1:
        raise WrongUsage("say one of --rank, --energy, --budget, --shared and --exact")
    document = {
        "kind": "merge",
        **({"base": {"ref": base}} if base else {}),
        "inputs": inputs_of(inputs, block, component, leave_out, only, vectors, style_content),
        "method": _method(method, param, normalise),
        "seed": seed,
        "rank": said or {"exact": True},
        "output": {"dialect": dialect, "dtype": dtype},
        "numerics": "reproducible" if reproducible else "fast",
    }
    if auto:
        has_method = is_typed(context, "method") or param or normalise
        typed = {
            "strengths": any(parse_weighted(text)[0] != text for text in inputs),
            "method": has_method,
            "rank": said,
        }
        chosen = [name for name, its in typed.items() if its]
        recipe = filled_in(document, inputs, chosen, as_json=as_json)
    else:
        recipe = make_recipe(document, inputs)
    with as_typed(inputs):
        run(recipe, to, force=force, save_recipe=save_recipe, as_json=as_json)


def bake(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            show_default=False,
            help="The checkpoint, a file or a diffusers or transformers folder, named as adapters are.",
        ),
    ],
    inputs: Inputs,
    to: Out,
    method: MethodName = "linear",
    param: MethodParameters = None,
    normalise: Normalise = None,
    block: Blocks = None,
    component: Components = None,
    leave_out: LeaveOut = None,
    only: Only = None,
    vectors: Vectors = None,
    style_content: StyleContent = False,
    seed: Seed = 0,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Only keep: every tensor keeps its own.")
    ] = "keep",
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Bake into fp8 even if most of the change is lost.")
    ] = False,
    reproducible: Reproducible = False,
    save_recipe: SaveRecipe = None,
    force: Force = False,
    as_json: AsJSON = False,
) -> None:
    """Add adapters to a checkpoint's own weights: graft bake BASE ink.safetensors=0.8 -o OUT.

    s3://bucket/key is read, and written, where it lies: there is no local copy of the base.
    """
    recipe = make_recipe(
        {
            "kind": "bake",
            "base": {"ref": base},
            "inputs": inputs_of(inputs, block, component, leave_out, only, vectors, style_content),
            "method": _method(method, param, normalise),
            "seed": seed,
            "output": {"dtype": dtype} | ({"allow_loss": True} if allow_loss else {}),
            "numerics": "reproducible" if reproducible else "fast",
        },
        inputs,
    )
    with as_typed(inputs):
        run(recipe, to, force=force, save_recipe=save_recipe, as_json=as_json)


def inputs_of(
    weighted: Sequence[str],
    block: list[str] | None,
    component: list[str] | None,
    leave_out: list[str] | None,
    only: list[str] | None,
    vectors: list[str] | None,
    style_content: bool,
) -> list[dict[str, Any]]:
    shared = {
        "blocks": _factors(block, "--block"),
        "components": _factors(component, "--component"),
        "leave_out": leave_out or [],
    }
    if style_content and (len(weighted) != 2 or only):
        raise WrongUsage("--style-content takes two adapters, the style first, and no --only")
    kept = [["@style"], ["@content"]] if style_content else [only or []] * len(weighted)
    parsed = [parse_weighted(text) for text in weighted]
    beside = _vectors(vectors, [ref for ref, _ in parsed])
    return [
        {"ref": ref, "strength": strength, **shared, "only": its, **beside.get(ref, {})}
        for (ref, strength), its in zip(parsed, kept, strict=True)
    ]


def _vectors(texts: list[str] | None, refs: Sequence[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for text in texts or []:
        ref = next((ref for ref in refs if text.startswith(f"{ref}=")), None)
        if ref is None or len(text) == len(ref) + 1:
            raise WrongUsage(
                f"--vectors {text}: write --vectors REF=FILE, with one of the adapters"
            )
        found[ref] = {"vectors": {"ref": text[len(ref) + 1 :]}}
    return found


def _method(name: str, parameters: list[str] | None, normalise: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name}
    for text in parameters or []:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise WrongUsage(f"--param {text}: write --param NAME=VALUE")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found | ({"normalise": normalise} if normalise else {})


def _factors(texts: list[str] | None, option: str) -> dict[str, float]:
    """NAME=NUMBER of an option that may be repeated."""
    found = {}
    for text in texts or []:
        name, equals, number = text.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise WrongUsage(f"{option} {text}: write {option} NAME=NUMBER")
    return found


def run(
    recipe: "Recipe",
    to: str,
    *,
    force: bool,
    save_recipe: Path | None,
    as_json: bool,
    gather: "Gather | None" = None,
) -> None:
    """Do what a recipe says and print what became of it; `gather` finds the files that it names."""
    from merge.pins import pin
    from merge.plan import plan

    if any(_is_same(to, name) for name in recipe.refs()):
        raise CommandError(f"{to} is an input of the recipe itself; nothing was written")
    place = place_of(to, force=force)
    with RemoteBlocks() as blocks:
        files = (gather or gather_files)(recipe, blocks)
        if save_recipe is not None:
            _require_place(save_recipe, force, [place, *files.values()])
        _import_meanwhile(files.values())
        with err.status("hashing"):
            recipe = recipe.pin({name: pin(file) for name, file in files.items()})
        planned = plan(recipe, files)
        if planned.writes_folder and to.endswith(".safetensors"):
            raise CommandError(f"{to}: the result is a folder; name it without .safetensors")
        outcome = _execute(planned, place)
    if save_recipe is not None:
        write_text(save_recipe, recipe.to_yaml())
    if as_json:
        print_json(
            {
                "path": to,
                "sha256": outcome.sha256,
                "size": outcome.size,
                "recipe_digest": outcome.recipe_digest,
                "plan": planned.to_json(),
                "certificate": outcome.certificate,
            }
        )
    else:
        _print(planned, to, outcome)


# Hashing takes as long as the import from here on.
_LARGE = 2**30


def _import_meanwhile(files: Iterable["File"]) -> None:
    """Import torch beside the hashing of large files, which leaves a core and the interpreter free."""
    here = [file for file in files if isinstance(file, Path) and file.is_file()]
    if sum(file.stat().st_size for file in here) > _LARGE:
        threading.Thread(target=importlib.import_module, args=("torch",)).start()


def _is_same(one: str, other: str) -> bool:
    there = Path(one).exists() and Path(other).exists()
    return one == other or (there and Path(one).samefile(other))


def _require_place(recipe: Path, force: bool, taken: Iterable["File | Target"]) -> None:
    """Refuse to save a recipe where something else lies, or where nothing can lie."""
    if not recipe.parent.is_dir():
        raise CommandError(f"{recipe}: there is no folder {recipe.parent}; nothing was written")
    here = [path.resolve() for path in taken if isinstance(path, Path)]
    if recipe.resolve() in here:
        raise CommandError(f"{recipe} is an input or the output; save the recipe somewhere else")
    path_of(str(recipe), force=force)


def gather_files(recipe: "Recipe", blocks: RemoteBlocks) -> dict[str, "File"]:
    """What every REF of the recipe names."""
    return {
        source.name: open_source(source.name, blocks, is_adapter=param.endswith("]"))
        for param, source in recipe.sources()
    }


def _execute(planned: "Plan", to: "Path | Target") -> "Outcome":
    from merge.execute import execute
    from merge.plan import BakePlan

    if isinstance(planned, BakePlan):
        bar = byte_progress("baking", planned.cost.bytes_to_write)
    else:
        doing = {"extract": "extracting", "resize": "resizing"}
        bar = count_progress(doing.get(planned.recipe.kind, "merging"), None, "modules")
    with bar as progress:
        task = progress.task_ids[0]
        return execute(
            planned,
            to,
            lambda done, total: progress.update(task, completed=done, total=total),
        )


def _print(planned: "Plan", to: str, outcome: "Outcome") -> None:
    from merge.errors import counted

    certificate = outcome.certificate
    columns = _COLUMNS[certificate["kind"]]
    table = Table(box=None, pad_edge=False)
    for title in ("component", "modules", *(title for title, _, _ in columns)):
        table.add_column(title, justify="left" if title == "component" else "right")
    for component, modules in _by_component(certificate["modules"]).items():
        cells = (_range([m[field] for m in modules], form) for _, field, form in columns)
        table.add_row(component, str(len(modules)), *cells)
    if certificate["modules"]:
        out.print(table)
    if certificate.get("method", {"name": "linear"}) != {"name": "linear"}:
        out.print(_method_lines(certificate, [plain(its.name) for its in planned.adapters]))
    if summed := certificate.get("summed"):
        out.print(f"stored whole: {counted(summed, 'sum', 'sums')} of norms, biases or weights")
    if unchanged := certificate.get("layers_unchanged"):
        out.print(f"the same in both: {counted(range(unchanged), 'layer', 'layers')}")
    if left_out := certificate["left_out"]:
        out.print(f"left out: {counted(left_out, 'module', 'modules')}, as the recipe allows")
    for note in certificate.get("notes", ()):
        out.print(f"[yellow]note[/]    {plain(note)}")
    out.print(_verdict(certificate))
    out.print(f"recipe  {outcome.recipe_digest}")
    if outcome.sha256 is not None:
        out.print(f"output  sha256:{outcome.sha256}")
    out.print(f"[bold]{plain(to)}[/]  {decimal(outcome.size)}")


# title, field of a module in the certificate, how a value is shown
_FACTORS = [
    ("rank", "rank", "{:d}"),
    ("norm", "norm", "{:.3g}"),
    ("truncation", "truncation", "{:.2%}"),
    ("rounding", "rounding", "{:.3%}"),
]
_COLUMNS = {
    "merge": _FACTORS,
    "resize": _FACTORS,
    "extract": _FACTORS,
    "bake": [("norm", "norm", "{:.3g}"), ("values that stayed", "unchanged", "{:.2%}")],
}


def _method_lines(certificate: Mapping[str, Any], names: Sequence[str]) -> str:
    """The method with its parameters, and the coefficients that it has found, input by input."""
    method, *parameters = certificate["method"].values()
    said = [key for key in certificate["method"] if key != "name"]
    settings = ", ".join(f"{k} {as_yaml(value)}" for k, value in zip(said, parameters, strict=True))
    line = f"method  {method}" + (f" ({settings})" if settings else "")
    found = [
        its["coefficients"] for its in certificate["modules"].values() if "coefficients" in its
    ]
    for name, column in zip(names, zip(*found, strict=True), strict=False):
        numbers = [number for number in column if number is not None]
        line += f"\n        {name} at {_range(numbers, '{:.3g}')}" if numbers else ""
    return line


def _verdict(certificate: Mapping[str, Any]) -> str:
    if certificate["kind"] != "bake":
        if certificate["truncation"] == 0:
            return f"exact, but for storage rounding of {certificate['rounding']:.3%}"
        whole = _whole(certificate)
        return (
            f"error {certificate['error']:.2%} of {whole}: "
            f"truncation {certificate['truncation']:.2%}, rounding {certificate['rounding']:.3%}"
        )
    if certificate["elements"] == 0:
        return "nothing changes: the base, bit for bit"
    return (
        f"{certificate['elements']:,} values rounded once; "
        f"{certificate['unchanged']:.2%} of them stayed what they were"
    )


def _whole(certificate: Mapping[str, Any]) -> str:
    """What an adapter is measured against."""
    if certificate["kind"] == "extract":
        return "the difference"
    if certificate["kind"] == "resize":
        return "the adapter as it was"
    method = certificate["method"]["name"]
    return "the exact sum" if method == "linear" else f"what {method} gives"


def _by_component(modules: Mapping[str, Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name, facts in modules.items():
        found.setdefault(name.partition(".")[0], []).append(facts)
    return found


def _range(values: list[Any], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} – {high}"
