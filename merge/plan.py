"""Recipe + headers -> a plan that will succeed, or one MergeError that says what is impossible.

All checking happens here: every key of every input is resolved, shapes and families are compared,
the output is laid out and priced. Only headers and PEFT configs are read and no tensor library is
imported, so a web process can answer an impossible recipe at once. `merge.execute` decides nothing.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

from merge.bases import Base, Slice, open_base
from merge.errors import BadRecipe, ShapeMismatch, UnknownModules, Unsupported
from merge.families import FAMILIES
from merge.formats.adapters import AdapterLayout, Entry, read_config, read_layout
from merge.formats.header import Header, read_header
from merge.recipe import Input, Recipe

FACTOR_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# A module's stacked factors, their orthogonal parts and the result, for every worker thread.
_WORKING_COPIES = 6
_WORKERS = 2


@dataclass(frozen=True, slots=True)
class Adapter:
    """One input whose header kept every rule; `param` is its place in the recipe."""

    param: str
    name: str
    path: Path
    header: Header
    layout: AdapterLayout


@dataclass(frozen=True, slots=True)
class Term:
    """What one adapter contributes to one module: strength * its delta."""

    adapter: int
    entry: Entry
    strength: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the flattened delta."""
        assert self.entry.dims.extent is not None
        return self.entry.dims.extent

    @property
    def rank(self) -> int:
        assert self.entry.rank is not None
        return self.entry.rank


@dataclass(frozen=True, slots=True)
class Module:
    """All contributions to one module, in canonical order of the inputs; never empty."""

    component: str
    module: str
    kernel: tuple[int, ...]
    terms: tuple[Term, ...]

    @property
    def name(self) -> str:
        return f"{self.component}.{self.module}"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the flattened delta."""
        return self.terms[0].shape

    @property
    def rank(self) -> int:
        """The summed ranks: what an exact merge writes."""
        return sum(term.rank for term in self.terms)


@dataclass(frozen=True, slots=True)
class Cost:
    """What the plan will take: tensor bytes on disk, working memory, modules to compute."""

    modules: int
    bytes_to_write: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Adapters into one adapter. `dtype` is the safetensors name of the factors' dtype."""

    recipe: Recipe
    adapters: tuple[Adapter, ...]
    modules: tuple[Module, ...]
    left_out: tuple[str, ...]
    family: str
    dialect: str
    dtype: str
    cost: Cost

    @property
    def writes_folder(self) -> bool:
        """A PEFT adapter is two files; every other one is one."""
        return self.dialect == "peft"

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "merge",
            "family": self.family,
            "dialect": self.dialect,
            "dtype": self.dtype,
            **_described(self.adapters, self.modules, self.left_out, self.cost),
        }


@dataclass(frozen=True, slots=True)
class Patch:
    """A run of rows of one stored tensor, and the module whose delta is added to it."""

    module: Module
    slice: Slice


@dataclass(frozen=True, slots=True)
class BakePlan:
    """Adapters into a base. `patches`: file of the base -> key -> its patches by first row."""

    recipe: Recipe
    adapters: tuple[Adapter, ...]
    modules: tuple[Module, ...]
    left_out: tuple[str, ...]
    base: Base
    patches: Mapping[str, Mapping[str, tuple[Patch, ...]]]
    cost: Cost

    @property
    def writes_folder(self) -> bool:
        """The result of a bake has the base's layout."""
        return self.base.layout == "folder"

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "bake",
            "base": {"layout": self.base.layout, "files": len(self.base.files)},
            "tensors": sum(len(keys) for keys in self.patches.values()),
            **_described(self.adapters, self.modules, self.left_out, self.cost),
        }


Plan = MergePlan | BakePlan


def plan(recipe: Recipe, files: Mapping[str, Path]) -> Plan:
    """The checked steps of a recipe; `files` gives a local file or folder for every `recipe.refs()`."""
    adapters = tuple(
        _open_adapter(recipe.inputs[i], f"inputs[{i}]", files) for i in recipe.in_canonical_order()
    )
    inputs = [recipe.inputs[i] for i in recipe.in_canonical_order()]
    _check_selectors(inputs, adapters)
    families = _common_families(adapters)
    modules, left_out = _modules(inputs, adapters)
    if recipe.kind == "bake":
        return _plan_bake(recipe, files, adapters, modules, left_out, families)
    return _plan_merge(recipe, adapters, modules, left_out, families)


def _plan_merge(
    recipe: Recipe,
    adapters: tuple[Adapter, ...],
    modules: tuple[Module, ...],
    left_out: tuple[str, ...],
    families: Sequence[str],
) -> MergePlan:
    if not modules:
        raise BadRecipe("inputs", "every module has strength 0, so there is nothing to write")
    dialect = recipe.output.dialect or _common_dialect(adapters)
    components = sorted({module.component for module in modules})
    if dialect == "peft" and len(components) > 1:
        detail = f"peft holds one model, not {', '.join(components)}; use leave_out or diffusers"
        raise BadRecipe("output.dialect", detail)
    dtype = _DTYPES.get(recipe.output.dtype) or _common_dtype(adapters)
    item, alpha = FACTOR_BYTES[dtype], alpha_bytes(dialect)
    written = sum(
        planned_rank(recipe, module) * sum(module.shape) * item + alpha for module in modules
    )
    if recipe.rank.budget_bytes is not None:
        least = min(sum(module.shape) for module in modules) * item + alpha
        if recipe.rank.budget_bytes < least:
            detail = f"the smallest module needs {least} bytes at rank 1"
            raise BadRecipe("rank.budget_bytes", detail)
        written = min(written, recipe.rank.budget_bytes)
    working = 8 if recipe.numerics == "reproducible" else 4
    largest = max(sum(module.shape) * module.rank * working for module in modules)
    cost = Cost(len(modules), written, written + _WORKERS * _WORKING_COPIES * largest)
    return MergePlan(recipe, adapters, modules, left_out, families[0], dialect, dtype, cost)


def alpha_bytes(dialect: str) -> int:
    """What a module takes beside its factors: kohya and comfy store alphas, as float32."""
    return 4 if dialect in ("kohya", "comfy") else 0


def planned_rank(recipe: Recipe, module: Module) -> int:
    """The rank a module is written with, or the most it can get where the spectrum decides."""
    if recipe.rank.exact:
        return module.rank
    return min(module.rank, *module.shape, recipe.rank.fixed or module.rank)


def _plan_bake(
    recipe: Recipe,
    files: Mapping[str, Path],
    adapters: tuple[Adapter, ...],
    modules: tuple[Module, ...],
    left_out: tuple[str, ...],
    families: Sequence[str],
) -> BakePlan:
    assert recipe.base is not None  # a bake without a base is no recipe
    base = open_base(_file(recipe.base.name, "base", files), families)
    patches = _patches(base, modules, adapters)
    written = sum(file.header.file_size for file in base.files.values()) + sum(
        (base.path / name).stat().st_size for name in base.others
    )
    working = 8 if recipe.numerics == "reproducible" else 4
    largest = max((sum(m.shape) * m.rank * working for m in modules), default=0)
    cost = Cost(len(modules), written, _WORKERS * (3 * largest + TILE_BYTES))
    return BakePlan(recipe, adapters, modules, left_out, base, patches, cost)


# Scratch of one bake thread: a tile as stored, in float64, in float32, as stored again, and a mask.
TILE_ELEMENTS = 256 * 1024
TILE_BYTES = TILE_ELEMENTS * (4 + 8 + 4 + 4 + 1)


def _open_adapter(source: Input, param: str, files: Mapping[str, Path]) -> Adapter:
    path = _file(source.name, param, files)
    if path.is_dir():
        raise BadRecipe(param, f"{path.name} is a folder, not an adapter file")
    header = read_header(path)
    layout = read_layout(header, name=path.name, config=read_config(path))
    adapter = Adapter(param, path.name, path, header, layout)
    for entry in layout.entries:
        _check_plain(adapter, entry)
        _check_dtypes(adapter, entry)
    return adapter


def _check_plain(adapter: Adapter, entry: Entry) -> None:
    """Only plain LoRA of whole layers is merged and baked so far."""
    is_plain = entry.layout == "lora" and entry.keys.keys() <= {"down", "up", "alpha"}
    if not is_plain or entry.layer.module is None or adapter.layout.family is None:
        why = f"{entry.name} uses {entry.algorithm}; only plain LoRA can be merged or baked so far"
        raise Unsupported(adapter.name, why)


def _check_dtypes(adapter: Adapter, entry: Entry) -> None:
    for role in ("down", "up"):
        dtype = adapter.header.tensors[entry.keys[role]].dtype
        if dtype not in FACTOR_BYTES:
            raise Unsupported(adapter.name, f"{entry.keys[role]} is stored as {dtype}")


def _file(name: str, param: str, files: Mapping[str, Path]) -> Path:
    path = files.get(name)
    if path is None or not path.exists():
        raise BadRecipe(param, f"{name} was not found")
    return path


def _check_selectors(inputs: Iterable[Input], adapters: Iterable[Adapter]) -> None:
    """A component or glob that selects nothing anywhere is a typing error, not a wish."""
    said: dict[tuple[str, str], str] = {}
    matched: set[tuple[str, str]] = set()
    for source, adapter in zip(inputs, adapters, strict=True):
        names = {entry.name for entry in adapter.layout.entries}
        for field, globs in (
            ("components", {component: f"{component}.*" for component in source.components}),
            ("blocks", {glob: glob for glob in source.blocks}),
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
    for other in rest:
        common = [name for name in common if name in other.layout.families]
        if not common:
            detail = (
                f"{other.name} is for {_titles(other.layout.families)}, "
                f"but {first.name} for {_titles(first.layout.families)}"
            )
            raise BadRecipe(other.param, detail)
    return list(dict.fromkeys(name for name in common if name is not None))


def _titles(families: Iterable[str]) -> str:
    return " or ".join(FAMILIES[name].title for name in families)


def _modules(
    inputs: Iterable[Input], adapters: tuple[Adapter, ...]
) -> tuple[tuple[Module, ...], tuple[str, ...]]:
    """Every module with a contribution, by name, and the names of what was left out."""
    terms: dict[tuple[str, str], list[Term]] = defaultdict(list)
    left_out: set[str] = set()
    for index, source in enumerate(inputs):
        for entry in adapters[index].layout.entries:
            name = (entry.component, entry.layer.module or entry.layer.path)
            if source.leaves_out(*name):
                left_out.add(".".join(name))
                continue
            terms[name].append(Term(index, entry, source.strength_at(*name)))
    for name, candidates in terms.items():
        _check_shapes(".".join(name), candidates, adapters)
    modules = (
        Module(*name, max(t.entry.layer.shape[2:] for t in candidates), tuple(active))
        for name, candidates in sorted(terms.items())
        if (active := [term for term in candidates if term.strength != 0])
    )
    return tuple(modules), tuple(sorted(left_out))


def _check_shapes(name: str, terms: list[Term], adapters: tuple[Adapter, ...]) -> None:
    first = terms[0]
    for other in terms[1:]:
        if other.shape != first.shape:
            detail = f"the change is {other.shape}, in {adapters[first.adapter].name} it is {first.shape}"
            raise ShapeMismatch(adapters[other.adapter].name, name, detail)


def _patches(
    base: Base, modules: Iterable[Module], adapters: Sequence[Adapter]
) -> dict[str, dict[str, tuple[Patch, ...]]]:
    """File -> key -> patches by first row; UnknownModules for what the base does not have."""
    found: dict[str, dict[str, list[Patch]]] = defaultdict(lambda: defaultdict(list))
    missing: dict[int, list[str]] = defaultdict(list)
    for module in modules:
        slices = base.find(module.component, module.module)
        if not slices:
            for term in module.terms:
                missing[term.adapter].append(module.name)
        for piece in slices:
            _check_fits(adapters[module.terms[0].adapter], module, piece, base)
            found[piece.file][piece.key].append(Patch(module, piece))
    for index, names in missing.items():
        raise UnknownModules(adapters[index].name, names, f"the base {base.path.name}")
    return {
        file: {key: _in_order(patches) for key, patches in keys.items()}
        for file, keys in found.items()
    }


def _in_order(patches: Iterable[Patch]) -> tuple[Patch, ...]:
    ordered = sorted(patches, key=lambda patch: patch.slice.first_row)
    for one, two in pairwise(ordered):
        end = one.slice.first_row + one.slice.rows
        assert end <= two.slice.first_row, f"{one.module.name} and {two.module.name} overlap"
    return tuple(ordered)


def _check_fits(adapter: Adapter, module: Module, piece: Slice, base: Base) -> None:
    rows, columns = module.shape[::-1] if piece.transposed else module.shape
    if (rows, columns) != (piece.rows, piece.columns):
        detail = (
            f"the change is ({rows}, {columns}), "
            f"{piece.key} in {base.path.name} takes ({piece.rows}, {piece.columns})"
        )
        raise ShapeMismatch(adapter.name, module.name, detail)


def _common_dialect(adapters: Iterable[Adapter]) -> str:
    """The inputs' own dialect where they agree and we write it, else kohya, which most tools read."""
    dialects = {adapter.layout.dialect for adapter in adapters}
    only = dialects.pop() if len(dialects) == 1 else "kohya"
    return only if only in {"kohya", "diffusers", "comfy"} else "kohya"


def _common_dtype(adapters: Iterable[Adapter]) -> str:
    """The narrowest dtype that holds every input's factors, whatever their order."""
    found = {
        adapter.header.tensors[entry.keys[role]].dtype
        for adapter in adapters
        for entry in adapter.layout.entries
        for role in ("down", "up")
    }
    return found.pop() if found in ({"F16"}, {"BF16"}) else "F32"


def _described(
    adapters: tuple[Adapter, ...],
    modules: tuple[Module, ...],
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
