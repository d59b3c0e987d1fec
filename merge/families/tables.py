"""The layers of one model in every naming, as generated from the model's class.

A data file holds a tree whose nodes are the parts of module paths. Equal neighbours are one node
that is called after its range, "0..18"; a leaf is [kind, shape of the weight, has a bias].
Beside our own names it says which other namings the model has, and by which rules.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from merge.families import packing
from merge.families.layers import CONV, LINEAR, OWN, Layer, Module, Run, own_layer
from merge.families.originals import Rules

DATA = Path(__file__).parent / "data"
TEXT_MODEL = "text_model."
_NUMBERS = re.compile(r"\d+(\.\.\d+)?")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")

Tree = dict[str, Any]


class Table:
    """One model. `modules` are by our own paths, `layers` by naming and path.

    `namings` says by which rules of `merge.families.packing` each other naming follows from ours.
    """

    def __init__(self, tree: Tree, namings: Mapping[str, str | Rules]) -> None:
        self._tree, self.namings = tree, namings
        self._packed: dict[str, Mapping[str, tuple[tuple[Layer, Run], ...]]] = {}

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        return dict(_modules(self._tree))

    @cached_property
    def layers(self) -> Mapping[str, Mapping[str, Layer]]:
        own = {path: own_layer(path, module) for path, module in self.modules.items()}
        packed = {name: packing.pack(rules, name, own) for name, rules in self.namings.items()}
        return {OWN: own} | packed

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

    def packed(self, naming: str) -> Mapping[str, tuple[tuple[Layer, Run], ...]]:
        """Our module path -> where its rows are in a naming, by rows of the module."""
        if naming not in self._packed:
            found: dict[str, list[tuple[Layer, Run]]] = {}
            for layer in self.layers[naming].values():
                for run in layer.runs:
                    found.setdefault(run.module, []).append((layer, run))
            self._packed[naming] = {
                module: tuple(sorted(pieces, key=lambda piece: piece[1].first))
                for module, pieces in found.items()
            }
        return self._packed[naming]

    @cached_property
    def beginnings(self) -> frozenset[str]:
        """`packing.beginning_of` all paths in any naming, without numbers; expands no tree."""
        text_model = self._tree.get(TEXT_MODEL.rstrip("."), {})
        own = {*_beginnings(self._tree), *_beginnings(text_model)}
        all_of = own.union(*(packing.beginnings(rules) for rules in self.namings.values()))
        return frozenset(map(packing.without_numbers, all_of))

    @property
    def has_text_model(self) -> bool:
        return TEXT_MODEL.rstrip(".") in self._tree

    def head(self, naming: str) -> Layer:
        """The first linear layer or convolution of a naming, as a cheap probe: expands no tree."""
        path, module = next(i for i in _modules(self._tree) if i[1].kind in (LINEAR, CONV))
        own = {path: own_layer(path, module)}
        if naming == OWN:
            return own[path]
        (layer,) = packing.pack(self.namings[naming], naming, own).values()
        return layer


@cache
def read_table(name: str) -> Table:
    """The generated table `data/<name>.json`; families share those of their text encoders."""
    data = json.loads((DATA / f"{name}.json").read_text("utf-8"))
    return Table(data["modules"], data["namings"])


def make_table(modules: Mapping[str, Any], namings: Mapping[str, str | Rules]) -> Table:
    """A table of expanded paths -> leaves, as `merge.families.generate` describes a model."""
    return Table(as_tree(modules), namings)


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


def _beginnings(tree: Tree, parts: tuple[str, ...] = ()) -> Iterator[str]:
    """`packing.beginning_of` every path, from the upper nodes alone."""
    for name, node in tree.items():
        here = (*parts, "#" if _NUMBERS.fullmatch(name) else name)
        if isinstance(node, list) or (parts and here[-1] != "#"):
            yield "_".join(here)
        else:
            yield from _beginnings(node, here)


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


def _modules(tree: Tree) -> Iterator[tuple[str, Module]]:
    for path, (kind, shape, has_bias) in expand(tree):
        yield path, Module(kind, tuple(shape), has_bias)


def _add(paths: dict[str, Layer], path: str, layer: Layer) -> None:
    """A path that two namings share must mean the same rows in both."""
    other = paths.setdefault(path, layer)
    assert other.runs == layer.runs, f"{path} names two layers"
