"""Recipe + headers -> a plan that will succeed, or one MergeError that says what is impossible.

All checking happens here: every key of every input is resolved, shapes and families are compared,
the output is laid out and priced. Only headers and PEFT configs are read and no tensor library is
imported, so a web process can answer an impossible recipe at once. `merge.execute` decides nothing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from merge.additions import Additions
from merge.bases import Base, open_base
from merge.cost import DTYPES, FACTOR_BYTES, WORKERS, Cost, alpha_bytes
from merge.errors import BadRecipe, Unsupported
from merge.extract_plan import ExtractPlan, plan_extract
from merge.families import FAMILIES
from merge.formats.adapters import AdapterLayout, Entry, read_config, read_layout
from merge.formats.grammar import NOTHING
from merge.formats.header import Header, read_header
from merge.formats.sources import File, is_folder, shown_name
from merge.formats.targets import BLOCK_BYTES, WAITING_THREADS
from merge.method_parameters import Space
from merge.modules import Module, lay_out
from merge.patches import Patch, find_patches
from merge.presets import expand
from merge.recipe import Input, Recipe
from merge.terms import Name, Source, Term, gather
from merge.units import KEPT_UNITS, Unit, join
from merge.vectors import Vectors, read_vectors

# What factors may be stored in: floats that torch can widen. Numbers that count or mark may be others.
_READABLE = {"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"}
_MARKS = {"alpha", "on_input", "ranknum", "scaled_oft", "bias_indices", "bias_size"}
# A module's stacked factors, their orthogonal parts and the result, for every worker thread.
_WORKING_COPIES = 6
# Of a method of the core, which computes in float64: what comes in, the cores' bases and the result.
_CORE_COPIES, _CORE_BYTES = 8, 8


@dataclass(frozen=True, slots=True)
class Adapter:
    """One input whose header kept every rule; `param` is its place in the recipe, `path` where it
    lies, on this machine or not, `wanted` what the recipe says of it, presets written out.
    """

    param: str
    wanted: Input
    name: str
    path: File
    header: Header
    layout: AdapterLayout
    vectors: Vectors | None = None


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Adapters into one adapter. `dtype` is the safetensors name of the factors' dtype; `most_rank`
    the largest rank that a layer may be written with; `base` what changes that depend on one are
    computed on.
    """

    recipe: Recipe
    adapters: tuple[Adapter, ...]
    modules: tuple[Module, ...]
    left_out: tuple[str, ...]
    family: str | None
    dialect: str
    dtype: str
    most_rank: int
    cost: Cost
    base: Base | None = None

    @property
    def writes_folder(self) -> bool:
        """A PEFT adapter is two files; every other one is one."""
        return self.dialect == "peft"

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.recipe.kind,
            "family": self.family,
            "dialect": self.dialect,
            "dtype": self.dtype,
            **_described(self.adapters, self.left_out, self.cost),
        }


@dataclass(frozen=True, slots=True)
class BakePlan:
    """Adapters into a base. `patches`: file of the base -> key -> its patches by first row."""

    recipe: Recipe
    adapters: tuple[Adapter, ...]
    left_out: tuple[str, ...]
    base: Base
    patches: Mapping[str, Mapping[str, tuple[Patch, ...]]]
    additions: Additions
    notes: tuple[str, ...]
    cost: Cost

    @property
    def writes_folder(self) -> bool:
        """The result of a bake has the base's layout."""
        return self.base.is_folder

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "bake",
            "base": {"layout": self.base.layout, "files": len(self.base.files)},
            "tensors": sum(len(keys) for keys in self.patches.values()),
            "notes": list(self.notes),
            **_described(self.adapters, self.left_out, self.cost),
        }


Plan = MergePlan | BakePlan | ExtractPlan


def plan(recipe: Recipe, files: Mapping[str, File]) -> Plan:
    """The checked steps of a recipe; `files` has what every `recipe.refs()` names."""
    if recipe.kind == "extract":
        return plan_extract(recipe, files)
    adapters, inputs, families = open_inputs(recipe, files, recipe.in_canonical_order())
    sources, left_out = gather(inputs, [adapter.layout for adapter in adapters])
    base = None
    if recipe.base is not None:
        if recipe.kind != "bake" and not any(_needs_base(source) for source in _all(sources)):
            raise BadRecipe("base", "no input depends on one")
        base = open_base(_file(recipe.base.name, "base", files), families)
    sources = join(sources, recipe, [adapter.name for adapter in adapters], base)
    if recipe.kind == "bake":
        assert base is not None, "a bake without a base is no recipe"
        return _plan_bake(recipe, base, adapters, sources, tuple(sorted(left_out)))
    return _plan_merge(recipe, base, adapters, sources, tuple(sorted(left_out)), families)


def open_inputs(
    recipe: Recipe, files: Mapping[str, File], order: Sequence[int]
) -> tuple[tuple[Adapter, ...], list[Input], list[str]]:
    """The files of the recipe's inputs in an order of their indices, the inputs with their presets
    spelled out, and the families that all of them fit.
    """
    adapters = tuple(_open_adapter(recipe.inputs[i], f"inputs[{i}]", files) for i in order)
    inputs = [
        expand(recipe.inputs[i], adapter.layout.family, adapter.param)
        for i, adapter in zip(order, adapters, strict=True)
    ]
    _check_selectors(inputs, adapters)
    return adapters, inputs, _common_families(adapters)


def _plan_merge(
    recipe: Recipe,
    base: Base | None,
    adapters: tuple[Adapter, ...],
    sources: Mapping[Name, Sequence[Source]],
    left_out: tuple[str, ...],
    families: Sequence[str],
) -> MergePlan:
    dialect = recipe.output.dialect or _common_dialect(recipe, adapters)
    family = families[0] if families else None
    names = [adapter.name for adapter in adapters]
    modules = lay_out(sources, names, family, dialect, has_base=base is not None)
    if not modules:
        why = (
            "every module is left out"
            if left_out and not sources
            else "every module has strength 0"
        )
        raise BadRecipe("inputs", f"{why}, so there is nothing to write")
    components = sorted({module.component for module in modules})
    if dialect == "peft" and len(components) > 1:
        detail = f"peft holds one model, not {', '.join(components)}; use leave_out or diffusers"
        raise BadRecipe("output.dialect", detail)
    dtype = DTYPES.get(recipe.output.dtype) or _common_dtype(adapters)
    item, alpha = FACTOR_BYTES[dtype], alpha_bytes(dialect)
    if recipe.kind == "resize":
        _check_smaller(recipe, modules, item, alpha)
    ranks = [planned_rank(recipe, module) for module in modules]
    written = sum(
        rank * sum(module.shape) * item + module.n_stored * item + alpha
        for rank, module in zip(ranks, modules, strict=True)
    )
    if recipe.rank.budget_bytes is not None or recipe.rank.shared is not None:
        _check_budget(recipe, modules, dialect)
    if recipe.rank.budget_bytes is not None:
        least = min(sum(module.shape) for module in modules if module.terms) * item + alpha
        if recipe.rank.budget_bytes < least:
            detail = f"the smallest module needs {least} bytes at rank 1"
            raise BadRecipe("rank.budget_bytes", detail)
        stored = sum(module.n_stored for module in modules) * item
        written = min(written, recipe.rank.budget_bytes + stored)
    working = 8 if recipe.numerics == "reproducible" else 4
    held = max(
        _WORKING_COPIES * working * _working_elements(module) + _core_bytes(recipe, module.terms)
        for module in modules
    )
    kept = _kept_bytes((module.terms for module in modules), working)
    cost = Cost(len(modules), written, written + WORKERS * held + kept)
    return MergePlan(
        recipe, adapters, modules, left_out, family, dialect, dtype, max(ranks), cost, base
    )


def _all(sources: Mapping[Name, Sequence[Source]]) -> Iterator[Source]:
    return (source for its in sources.values() for source in its)


def _needs_base(source: Source) -> bool:
    """Whether a base decides what it does, or what shape it has."""
    return source.entry.needs != NOTHING or 0 in source.entry.layer.shape


def _working_elements(module: Module) -> int:
    """Of a low-rank product: its factors. Else its rows and what they are computed from."""
    if module.is_dense:
        return prod(module.shape) + module.n_stored
    return sum(module.shape) * module.rank + module.n_stored


def _core_bytes(recipe: Recipe, terms: Sequence[Term]) -> int:
    """What a method of the core takes for the largest unit of a layer."""
    if recipe.method.space is not Space.CORE:
        return 0
    units = [term.entry for term in terms if isinstance(term.entry, Unit)]
    numbers = (sum(unit.layer.extent) * (unit.exact_rank or 0) for unit in units)
    return _CORE_COPIES * _CORE_BYTES * max(numbers, default=0)


def _kept_bytes(layers: Iterable[Sequence[Term]], working: int) -> int:
    """What stays of units that are in several layers."""
    sizes = {
        term.entry.name: _unit_bytes(term.entry, working)
        for terms in layers
        for term in terms
        if isinstance(term.entry, Unit) and not term.entry.is_within(terms)
    }
    return min(KEPT_UNITS, len(sizes)) * max(sizes.values(), default=0)


def _unit_bytes(unit: Unit, working: int) -> int:
    """Factors and their spectrum, or a matrix for every change that depends on the base."""
    if unit.exact_rank is not None:
        return 2 * _CORE_BYTES * sum(unit.layer.extent) * unit.exact_rank
    on_base = {
        (term.adapter, term.entry.name) for term in unit.terms if term.entry.needs != NOTHING
    }
    return len(on_base) * prod(unit.layer.extent) * working


def _check_smaller(recipe: Recipe, modules: Sequence[Module], item: int, alpha: int) -> None:
    """A resize makes something smaller, or was not meant."""
    wanted = recipe.rank
    present = [min(module.rank, *module.shape) for module in modules if module.terms]
    most = max(present, default=0)
    for field, rank in (("fixed", wanted.fixed), ("shared", wanted.shared)):
        if rank is not None and rank >= most:
            detail = f"no layer has more than rank {most}, so nothing would become smaller"
            raise BadRecipe(f"rank.{field}", detail)
    shapes = [module.shape for module in modules if module.terms]
    size = sum(
        rank * sum(shape) * item + alpha for rank, shape in zip(present, shapes, strict=True)
    )
    if wanted.budget_bytes is not None and wanted.budget_bytes >= size:
        detail = f"the factors take {size} bytes, so nothing would become smaller"
        raise BadRecipe("rank.budget_bytes", detail)


def _check_budget(recipe: Recipe, modules: Sequence[Module], dialect: str) -> None:
    """A budget is for factors, and may drop those of a layer."""
    param = "rank.shared" if recipe.rank.budget_bytes is None else "rank.budget_bytes"
    if not any(module.terms for module in modules):
        raise BadRecipe(param, "the inputs have no factors that could be smaller")
    for module in modules:
        if module.is_dense:
            detail = f"the change of {module.name} has full rank; say a rank or an energy"
            raise BadRecipe(param, detail)
    if dialect in ("diffusers", "peft") and any(module.biases for module in modules):
        detail = f"{dialect} keeps biases beside factors, which a budget may drop; say a rank"
        raise BadRecipe(param, detail)


def planned_rank(recipe: Recipe, module: Module) -> int:
    """The rank a module is written with, or the most it can get where the spectrum decides."""
    if recipe.rank.exact:
        return module.rank
    return min(module.rank, *module.shape, recipe.rank.fixed or module.rank)


def _plan_bake(
    recipe: Recipe,
    base: Base,
    adapters: tuple[Adapter, ...],
    sources: Mapping[Name, Sequence[Source]],
    left_out: tuple[str, ...],
) -> BakePlan:
    found = find_patches(base, sources, [adapter.name for adapter in adapters])
    written = sum(file.header.file_size for file in base.files.values()) + sum(
        (base.folder / name).stat().st_size for name in base.others
    )
    written += found.additions.size_bytes
    working = 8 if recipe.numerics == "reproducible" else 4
    patches = [p for keys in found.patches.values() for its in keys.values() for p in its]
    largest = max((patch.working_elements for patch in patches), default=0) * working
    core = max((_core_bytes(recipe, patch.terms) for patch in patches), default=0)
    kept = _kept_bytes((patch.terms for patch in patches), working)
    changed = {patch.name for patch in patches}
    blocks = _BLOCKS * min(BLOCK_BYTES, written)
    cost = Cost(
        len(changed), written, _WRITERS * (largest + TILE_BYTES) + WORKERS * core + kept + blocks
    )
    return BakePlan(
        recipe, adapters, left_out, base, found.patches, found.additions, found.notes, cost
    )


# Scratch of one bake thread: a tile as stored, in float64 twice, in float32, as stored again, a mask.
TILE_ELEMENTS = 256 * 1024
TILE_BYTES = TILE_ELEMENTS * (4 + 8 + 8 + 4 + 4 + 1)
# Threads that fill and write blocks, and blocks that are alive at once (merge.blocks).
_WRITERS = WORKERS + WAITING_THREADS
_BLOCKS = _WRITERS + 2


def _open_adapter(source: Input, param: str, files: Mapping[str, File]) -> Adapter:
    file = _file(source.name, param, files)
    if is_folder(file):
        raise BadRecipe(param, f"{source.name} is a folder, not an adapter file")
    header, name = read_header(file), shown_name(file)
    layout = read_layout(header, name=name, config=read_config(file))
    vectors = None
    if source.vectors is not None:
        where = f"{param}.vectors"
        vectors = read_vectors(_file(source.vectors.name, where, files), layout.entries, where)
    wanted = expand(source, layout.family, param)
    adapter = Adapter(param, wanted, name, file, header, layout, vectors)
    for entry in layout.entries:
        _check_dtypes(adapter, entry)
    return adapter


def _check_dtypes(adapter: Adapter, entry: Entry) -> None:
    for role, key in entry.keys.items():
        dtype = adapter.header.tensors[key].dtype
        if dtype not in _READABLE and role not in _MARKS:
            raise Unsupported(adapter.name, f"{key} is stored as {dtype}")


def _file(name: str, param: str, files: Mapping[str, File]) -> File:
    file = files.get(name)
    if file is None or (isinstance(file, Path) and not file.exists()):
        raise BadRecipe(param, f"{name} was not found")
    return file


def _check_selectors(inputs: Iterable[Input], adapters: Iterable[Adapter]) -> None:
    """A component or glob that selects nothing anywhere is a typing error, not a wish."""
    said: dict[tuple[str, str], str] = {}
    matched: set[tuple[str, str]] = set()
    for source, adapter in zip(inputs, adapters, strict=True):
        names = {
            f"{entry.component}.{run.module}"
            for entry in adapter.layout.entries
            for run in entry.layer.runs
        }
        for field, globs in (
            ("components", {component: f"{component}.*" for component in source.components}),
            ("blocks", {glob: glob for glob in source.blocks}),
            ("leave_out", {glob: glob for glob in source.leave_out}),
            ("only", {glob: glob for glob in source.only}),
        ):
            for key, glob in globs.items():
                said.setdefault((field, key), f"{adapter.param}.{field}.{key}")
                if any(fnmatchcase(name, glob) for name in names):
                    matched.add((field, key))
    for selector, param in said.items():
        if selector not in matched:
            raise BadRecipe(param, "matches no module of any input that it is given for")


def _common_families(adapters: Sequence[Adapter]) -> list[str]:
    """Families that all inputs fit, the first input's likeliest first.

    An adapter of a text encoder alone fits several; what it is merged with then decides.
    """
    first, *rest = adapters
    common = [first.layout.family, *first.layout.families]
    if not first.layout.families:
        known = [other for other in rest if other.layout.families]
        for other in known:
            detail = f"{other.name} is for {_titles(other.layout.families)}, {first.name} is not"
            raise BadRecipe(other.param, detail)
    for other in rest if first.layout.families else ():
        common = [name for name in common if name in other.layout.families]
        if not common:
            detail = (
                f"{other.name} is for {_titles(other.layout.families)}, "
                f"but {first.name} for {_titles(first.layout.families)}"
            )
            raise BadRecipe(other.param, detail)
    return list(dict.fromkeys(name for name in common if name is not None))


def _titles(families: Iterable[str]) -> str:
    return " or ".join(FAMILIES[name].title for name in families) or "a model of no family we know"


def _common_dialect(recipe: Recipe, adapters: Iterable[Adapter]) -> str:
    """The inputs' own dialect where they agree and we write it, else kohya, which most tools read."""
    dialects = {adapter.layout.dialect for adapter in adapters}
    if not any(adapter.layout.families for adapter in adapters):
        return "peft"
    if recipe.kind == "resize" and dialects == {"peft"}:
        return "peft"
    only = dialects.pop() if len(dialects) == 1 else "kohya"
    return only if only in {"kohya", "diffusers", "comfy"} else "kohya"


def _common_dtype(adapters: Iterable[Adapter]) -> str:
    """The narrowest dtype that holds every input's factors, whatever their order."""
    found = {
        adapter.header.tensors[key].dtype
        for adapter in adapters
        for entry in adapter.layout.entries
        for role, key in entry.keys.items()
        if role not in _MARKS
    }
    return found.pop() if found in ({"F16"}, {"BF16"}) else "F32"


def _described(
    adapters: tuple[Adapter, ...],
    left_out: tuple[str, ...],
    cost: Cost,
) -> dict[str, Any]:
    return {
        "inputs": [
            {
                "file": adapter.name,
                "dialect": adapter.layout.dialect,
                "family": adapter.layout.family,
                "modules": len(adapter.layout.entries),
            }
            for adapter in adapters
        ],
        "modules": cost.modules,
        "left_out": list(left_out),
        "bytes_to_write": cost.bytes_to_write,
        "memory_bytes": cost.memory_bytes,
    }
