"""The layers of one model in every naming, as generated from the model's class.

A data file holds a tree whose nodes are the parts of module paths. Equal neighbours are one node
that is called after its range, "0..18"; a leaf is [kind, shape of the weight, has a bias].
The tree of the original naming has a fourth item, its runs: [module, first, begin, rows], where
`{0}` in the module is the first number in the path of the leaf.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from merge.families import ldm
from merge.families.layers import CONV, LINEAR, ORIGINAL, OWN, Layer, Module, Run, own_layer

DATA = Path(__file__).parent / "data"
TEXT_MODEL = "text_model."
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_LDM = "ldm"  # in place of a tree: the names follow from our own by a rule

Tree = dict[str, Any]


class Table:
    """One model. `modules` are by our own paths, `layers` by naming and path."""

    def __init__(self, modules: Tree, original: Tree | str | None = None) -> None:
        self._modules, self._original = modules, original

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        return {
            path: Module(kind, tuple(shape), has_bias)
            for path, (kind, shape, has_bias) in expand(self._modules)
        }

    @cached_property
    def layers(self) -> Mapping[str, Mapping[str, Layer]]:
        own = {path: own_layer(path, module) for path, module in self.modules.items()}
        if self._original is None:
            return {OWN: own}
        if self._original == _LDM:
            return {OWN: own, ORIGINAL: _renamed(ldm.names(own), own)}
        assert isinstance(self._original, dict)
        original = {path: _layer(path, leaf) for path, leaf in expand(self._original)}
        return {OWN: own, ORIGINAL: original}

    @cached_property
    def by_path(self) -> Mapping[str, Layer]:
        """Dotted path in any naming -> layer; text encoders with and without `text_model.`."""
        paths: dict[str, Layer] = {}
        for layers in self.layers.values():
            for path, layer in layers.items():
                _add(paths, path, layer)
                _add(paths, path.removeprefix(TEXT_MODEL), layer)
        return paths

    @cached_property
    def by_flat_path(self) -> Mapping[str, Layer]:
        """The same for paths whose dots became underscores, as kohya and LyCORIS write them."""
        flat: dict[str, Layer] = {}
        for path, layer in self.by_path.items():
            _add(flat, path.replace(".", "_"), layer)
        return flat

    @cached_property
    def packed(self) -> Mapping[str, tuple[tuple[Layer, Run], ...]]:
        """Our module path -> where its rows are in the original naming, by rows of the module."""
        found: dict[str, list[tuple[Layer, Run]]] = {}
        for layer in self.layers.get(ORIGINAL, {}).values():
            for run in layer.runs:
                found.setdefault(run.module, []).append((layer, run))
        return {
            module: tuple(sorted(pieces, key=lambda piece: piece[1].first))
            for module, pieces in found.items()
        }

    @cached_property
    def tops(self) -> frozenset[str]:
        """First parts of all paths in any naming. Expands no tree."""
        tops = {*self._modules}
        if self._original == _LDM:
            tops |= ldm.TOPS
        elif isinstance(self._original, dict):
            tops |= {*self._original}
        text_model = self._modules.get(TEXT_MODEL.rstrip("."), {})
        return frozenset(tops | {*text_model})

    def head(self, naming: str) -> Layer:
        """The first linear layer or convolution of a naming, as a cheap probe: expands no tree."""
        if naming == ORIGINAL and isinstance(self._original, dict):
            return next(_layer(*item) for item in expand(self._original) if _takes(item[1]))
        path, (kind, shape, has_bias) = next(i for i in expand(self._modules) if _takes(i[1]))
        own = own_layer(path, Module(kind, tuple(shape), has_bias))
        if naming == OWN:
            return own
        (renamed,) = _renamed(ldm.names([path]), {path: own}).values()
        return renamed


@cache
def read_table(name: str) -> Table:
    """The generated table `data/<name>.json`; families share those of their text encoders."""
    data = json.loads((DATA / f"{name}.json").read_text("utf-8"))
    return Table(data["modules"], data.get("original"))


def make_table(
    modules: Mapping[str, Any], original: Mapping[str, Any] | str | None = None
) -> Table:
    """A table of expanded paths -> leaves, as `merge.families.generate` describes a model."""
    tree = original if original is None or isinstance(original, str) else as_tree(original)
    return Table(as_tree(modules), tree)


def expand(tree: Tree) -> Iterator[tuple[str, list[Any]]]:
    """(path, leaf) of every leaf, in the order of the model."""
    for name, node in tree.items():
        match = _RANGE.fullmatch(name)
        names = [name] if match is None else map(str, range(int(match[1]), int(match[2]) + 1))
        if isinstance(node, list):
            yield from ((name, node) for name in names)
            continue
        inner = list(expand(node))
        for name in names:
            yield from ((f"{name}.{path}", leaf) for path, leaf in inner)


def as_tree(leaves: Mapping[str, Any]) -> Tree:
    """What `expand` undoes: the paths as a tree, equal numbered neighbours as one range."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            assert isinstance(node, dict), f"{path} lies below a layer"
        node[last] = list(leaf)
    return _folded(tree)


def _folded(tree: Tree) -> Tree:
    folded: Tree = {}
    previous: tuple[str, Any] | None = None
    for name, node in tree.items():
        inner = _folded(node) if isinstance(node, dict) else node
        if previous is not None and name.isdecimal():
            first, _, last = previous[0].partition("..")
            last = last or first
            is_next = last.isdecimal() and int(name) == int(last) + 1
            if is_next and _same(previous[1], inner):
                del folded[previous[0]]
                name = f"{first}..{name}"
        folded[name] = inner
        previous = name, inner
    return folded


def _same(one: Any, two: Any) -> bool:
    return json.dumps(one) == json.dumps(two)  # the order of parts counts


def _layer(path: str, leaf: list[Any]) -> Layer:
    kind, shape, has_bias, runs = leaf
    number = next((part for part in path.split(".") if part.isdecimal()), "")
    packed = tuple(
        Run(module.replace("{0}", number), first, begin, rows)
        for module, first, begin, rows in runs
    )
    return Layer(ORIGINAL, path, kind, tuple(shape), has_bias, packed)


def _takes(leaf: list[Any]) -> bool:
    return leaf[0] in (LINEAR, CONV)


def _renamed(names: Mapping[str, str], own: Mapping[str, Layer]) -> dict[str, Layer]:
    return {
        names[path]: Layer(
            ORIGINAL, names[path], layer.kind, layer.shape, layer.has_bias, layer.runs
        )
        for path, layer in own.items()
    }


def _add(paths: dict[str, Layer], path: str, layer: Layer) -> None:
    """A path that two namings share must mean the same rows in both."""
    other = paths.setdefault(path, layer)
    assert other.runs == layer.runs, f"{path} names two layers"
