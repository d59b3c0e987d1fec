"""Two checkpoints of one model side by side, whatever layout each is in: what can be compared.

Layers are matched by our own names and must have the same shapes. What is no layer that an adapter
could change (a VAE, tables of a tokenizer) is matched by its key. What only one of the two has is
refused unless it is left out by name. Needs headers and configurations alone.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from merge.bases import MODEL, Base, Slice, open_base, refuse_adapter
from merge.errors import BadCheckpoint, BadRecipe
from merge.families import FAMILIES, Layer, Module
from merge.families.checkpoints import read_checkpoint
from merge.families.layers import CONV, EMBEDDING, LINEAR, NORM, PARAMETER, own_layer
from merge.formats.header import Header, TensorInfo, read_header
from merge.formats.sources import File, is_folder, shown_name
from merge.terms import Name

LeavesOut = Callable[[str, str], bool]
PARAMETERS = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class Other:
    """A tensor of no layer: (file, key) in the base and in the tuned checkpoint."""

    name: str
    base: tuple[str, str]
    tuned: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Pair:
    """`modules` are the layers that both have, in our own naming and in the shape they have here.

    `left_out` has one name for a component of which nothing is compared, `names_left_out` all names.
    `unmatched` are what only one of them has, or in another shape. `notes` say what was not compared
    and needs not be.
    """

    base: Base
    tuned: Base
    family: str | None
    modules: Mapping[Name, Layer]
    others: tuple[Other, ...]
    left_out: tuple[str, ...]
    names_left_out: frozenset[str]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]


def open_pair(base: File, tuned: File, leaves_out: LeavesOut) -> Pair:
    """Both by their headers; BadCheckpoint names what cannot be compared."""
    found = _match(base, tuned, leaves_out)
    found.check()
    return found.pair()


def open_overlap(base: File, tuned: File) -> Pair:
    """What both have, whatever else one of them has."""
    return _match(base, tuned, lambda component, module: False).pair()


def _match(base: File, tuned: File, leaves_out: LeavesOut) -> "_Matching":
    families = _common_families(base, tuned)
    one, two = open_base(base, families), open_base(tuned, families)
    return _Matching(one, two, families[0] if families else None, leaves_out)


def check_globs(pair: Pair, leave_out: Iterable[str], only: Iterable[str]) -> None:
    """A glob that selects nothing is a typing error, not a wish."""
    compared = [".".join(name) for name in pair.modules] + [other.name for other in pair.others]
    for field, globs, names in (
        ("leave_out", leave_out, pair.names_left_out),
        ("only", only, compared),
    ):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                detail = "matches nothing that the two checkpoints hold"
                raise BadRecipe(f"tuned.{field}.{glob}", detail)


def _common_families(base: File, tuned: File) -> list[str]:
    one, two = _families_of(base), _families_of(tuned)
    common = [name for name in one if name in two]
    if (one or two) and not common:
        detail = f"it is {_titled(two)}, and the base {shown_name(base)} is {_titled(one)}"
        raise BadCheckpoint(shown_name(tuned), detail)
    return common


def _titled(families: Sequence[str]) -> str:
    if not families:
        return "a model of no family we know"
    return " or ".join(FAMILIES[name].title for name in families)


def _families_of(file: File) -> tuple[str, ...]:
    """Those whose keys and shapes a checkpoint has, in any layout; () where none fits."""
    header = _joined_header(open_base(file, ())) if is_folder(file) else read_header(file)
    try:
        return tuple(family.name for family in read_checkpoint(header, shown_name(file)).families)
    except BadCheckpoint:
        refuse_adapter(header, shown_name(file))
        return ()


def _joined_header(base: Base) -> Header:
    """All tensors of a folder as if they lay in one file, those of components under their names."""
    tensors = {
        key if file.component == MODEL else f"{file.component}.{key}": info
        for file in base.files.values()
        for key, info in file.header.tensors.items()
    }
    first = next(iter(base.files.values())).header
    return replace(first, tensors=MappingProxyType(tensors))


class _Matching:
    """One pass over the layers of a model, collecting what fits and what does not."""

    def __init__(self, base: Base, tuned: Base, family: str | None, leaves_out: LeavesOut) -> None:
        self._base, self._tuned, self._family = base, tuned, family
        self._leaves_out = leaves_out
        self._claimed: tuple[set[tuple[str, str]], set[tuple[str, str]]] = (set(), set())
        self._missing: tuple[list[str], list[str]] = ([], [])  # in the base, in the tuned one
        self._misfits: dict[str, str] = {}  # name -> what is wrong
        self._left_out: set[str] = set()
        self._kept: set[str] = set()  # components of which something is compared
        self._notes: set[str] = set()

        self._modules: dict[Name, Layer] = {}
        for (component, path), module in self._expected():
            layer = self._match(component, path, module)
            if layer is not None:
                self._modules[component, path] = layer
                self._kept.add(component)
        self._others = tuple(self._match_others())
        self._kept |= {other.name.partition(".")[0] for other in self._others}

    def pair(self) -> Pair:
        unmatched = {*self._missing[0], *self._missing[1], *self._misfits}
        return Pair(
            self._base,
            self._tuned,
            self._family,
            self._modules,
            self._others,
            self._whole(self._left_out),
            frozenset(self._left_out),
            self._whole(unmatched),
            tuple(sorted(self._notes)),
        )

    def _expected(self) -> Iterator[tuple[Name, Module]]:
        """Every layer that either may have."""
        if self._family is not None:
            for component, modules in FAMILIES[self._family].components.items():
                for path, module in modules.items():
                    yield (component, path), module
            return
        yield from _layers_of(self._base).items()

    def _match(self, component: str, path: str, module: Module) -> Layer | None:
        """The layer where both have it, in the shape of the base."""
        parameters = PARAMETERS if module.has_bias else PARAMETERS[:1]
        found = [
            [base.find(component, path, parameter, kind=module.kind) for parameter in parameters]
            for base in self._both
        ]
        one, two = ([_extent(its) for its in pieces] for pieces in found)
        if one[0] is None and two[0] is None:
            return None
        for side, pieces in enumerate(found):
            for its in pieces:
                self._claim(side, its)
        name = f"{component}.{path}"
        if self._leaves_out(component, path):
            self._left_out.add(name)
            return None
        missing = [
            (0 if mine is None else 1)
            for mine, its in zip(one, two, strict=True)
            if (mine is None) != (its is None)
        ]
        if missing:
            self._missing[missing[0]].append(name)
            return None
        if one != two:
            self._misfits[name] = f"{name} is {_shown(two)} and in the base {_shown(one)}"
            return None
        assert one[0] is not None, "what neither has is not here"
        shape = self._base.shape(component, path, kind=module.kind) or _shape(module, one[0])
        return own_layer(path, Module(module.kind, shape, None not in one and module.has_bias))

    def _whole(self, names: Iterable[str]) -> tuple[str, ...]:
        """A component of which nothing is compared is one name, not a thousand."""
        parts = ((name, name.partition(".")[0]) for name in names)
        return tuple(sorted({n if part in self._kept else f"{part}.*" for n, part in parts}))

    @property
    def _both(self) -> tuple[Base, Base]:
        return self._base, self._tuned

    def _claim(self, side: int, pieces: Iterable[Slice]) -> None:
        for piece in pieces:
            self._claimed[side].add((piece.file, piece.key))
            if piece.is_copy:
                self._notes.add("moving averages of the weights (model_ema) are not compared")

    def _match_others(self) -> Iterator[Other]:
        """What no layer has claimed, by name."""
        one, two = (dict(self._unclaimed(side)) for side in range(2))
        for name in sorted({*one, *two}):
            component, _, rest = name.partition(".")
            if self._leaves_out(component, rest):
                self._left_out.add(name)
            elif name in one and name in two:
                infos = [self._info(side, its[name]) for side, its in enumerate((one, two))]
                if infos[0].shape != infos[1].shape:
                    shapes = f"{list(infos[1].shape)} and in the base {list(infos[0].shape)}"
                    self._misfits[name] = f"{name} is {shapes}"
                else:
                    yield Other(name, one[name], two[name])
            else:
                self._missing[0 if name in two else 1].append(name)

    def _unclaimed(self, side: int) -> Iterator[tuple[str, tuple[str, str]]]:
        for file_name, file in self._both[side].files.items():
            for key in file.header.tensors:
                if (file_name, key) in self._claimed[side]:
                    continue
                if key.rpartition(".")[2] in _BUFFERS or key.startswith("model_ema."):
                    continue
                yield _name(file.component, key), (file_name, key)

    def _info(self, side: int, place: tuple[str, str]) -> TensorInfo:
        return self._both[side].files[place[0]].header.tensors[place[1]]

    def check(self) -> None:
        """One error for the first kind of difference that stands against a comparison."""
        for side, names in enumerate(self._missing):
            if names:
                raise BadCheckpoint(self._both[side].path.name, self._what_is_missing(side, names))
        if self._misfits:
            first, *others = self._misfits.values()
            more = f" (and {len(others)} more)" if others else ""
            raise BadCheckpoint(self._tuned.path.name, first + more)

    def _what_is_missing(self, side: int, names: Sequence[str]) -> str:
        """In groups, because a missing component is a thousand missing tensors."""
        groups = Counter(name.partition(".")[0] for name in names)
        group, n = groups.most_common(1)[0]
        mine = [name for name in names if name.partition(".")[0] == group]
        other = "the tuned checkpoint" if side == 0 else "the base"
        shown = f"{mine[0]} and {n - 1} more of {group}" if n > 1 else mine[0]
        glob = f"{group}.*" if n > 1 else mine[0]
        return f"it lacks {shown}, which {other} has; leave_out of {glob!r} compares the rest"


# What is computed from a configuration, counts, or says how others are stored: no weight of a model.
_BUFFERS = frozenset(
    {
        *("position_ids", "inv_freq", "num_batches_tracked", "num_updates", "decay"),
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
        *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
        *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
        *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        *("logvar", "logit_scale", "denoiser_sigmas", "log_sigmas", "sigmas"),
        *("scale_weight", "weight_scale", "weight_scale_inv", "scale_input", "input_scale"),
        *("comfy_quant", "scaled_fp8"),
    }
)
_VAE = ("first_stage_model.", "vae.")


def _name(component: str | None, key: str) -> str:
    """What messages and globs call a tensor that is no layer."""
    if component not in (None, MODEL):
        return f"{component}.{key}"
    for prefix in _VAE:
        if key.startswith(prefix):
            return f"vae.{key.removeprefix(prefix)}"
    return key


def _extent(pieces: Sequence[Slice]) -> tuple[int, int] | None:
    """(rows, columns) of the matrix that the pieces are."""
    own = [piece for piece in pieces if not piece.is_copy]
    if not own:
        return None
    rows = sum(piece.columns if piece.is_transposed else piece.rows for piece in own)
    return rows, own[0].rows if own[0].is_transposed else own[0].columns


def _shown(extents: Sequence[tuple[int, int] | None]) -> str:
    weight = extents[0]
    assert weight is not None
    return f"{weight[0]} x {weight[1]}"


def _shape(module: Module, extent: tuple[int, int]) -> tuple[int, ...]:
    """The shape of a weight that lies in several pieces."""
    if module.extent == extent or len(module.shape) < 2:
        return module.shape
    return extent


_EMBEDDINGS = ("embed", "wte", "wpe", "word_embeddings", "position_embeddings")


def _layers_of(base: Base) -> dict[Name, Module]:
    """The layers of a model outside our tables, as its keys and shapes show them."""
    found: dict[Name, Module] = {}
    for file in base.files.values():
        component, tensors = file.component or MODEL, file.header.tensors
        for key, info in tensors.items():
            stem, _, last = key.rpartition(".")
            if last in _BUFFERS or (last == "bias" and f"{stem}.weight" in tensors):
                continue
            path, kind = (stem, _kind(stem, info)) if last == "weight" else (key, PARAMETER)
            shape = info.shape[::-1] if kind == LINEAR and base.is_conv1d(path) else info.shape
            if shape:
                found[component, path] = Module(kind, shape, f"{stem}.bias" in tensors)
    return found


def _kind(path: str, info: TensorInfo) -> str:
    if any(part in path.rpartition(".")[2] for part in _EMBEDDINGS):
        return EMBEDDING
    if len(info.shape) == 1:
        return NORM
    return LINEAR if len(info.shape) == 2 else CONV
