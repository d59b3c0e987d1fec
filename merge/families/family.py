"""What a family of base models is: its modules, and where they lie in each checkpoint layout."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path

from merge.families import original

TEXT_MODEL = "text_model."
_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class Module:
    """One layer with a weight. `kind` is linear, conv, norm or embedding."""

    kind: str
    shape: tuple[int, ...]  # of the weight: (out, in) or (out, in, kh, kw)
    has_bias: bool

    @property
    def takes_adapters(self) -> bool:
        return self.kind in ("linear", "conv")

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def extent(self) -> tuple[int, int]:
        """(out, in * kernel): the weight as a matrix."""
        return self.shape[0], prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module's parameter lies in a checkpoint: all of a key, or `rows` of a fused one.

    `is_transposed` says that the file holds the matrix the other way round.
    """

    key: str
    rows: tuple[int, int] | None = None
    is_transposed: bool = False


@dataclass(frozen=True)
class Family:
    """Base models with the same keys and shapes.

    Module paths are diffusers' and transformers' own, text encoders always with `text_model.`.
    `kohya` holds the prefixes of kohya's underscore names per component, the one we write first.
    `single_file` holds the prefix of each component in an LDM single file, by the naming used
    there: "ldm" (UNet), "hf" (CLIP in transformers' names) or "openclip".
    """

    name: str
    title: str
    architecture: str  # modelspec.architecture without the adapter part
    base_versions: tuple[str, ...]  # ss_base_model_version, the one we write first
    kohya: Mapping[str, tuple[str, ...]]
    kohya_names: str  # how kohya's trainer names the UNet: "diffusers" or "ldm"
    single_file: Mapping[str, tuple[str, str]]
    table: Mapping[str, Mapping[str, Module]] | None = field(default=None, repr=False)

    @cached_property
    def components(self) -> Mapping[str, Mapping[str, Module]]:
        """Component -> module path -> module, generated from the model classes."""
        if self.table is not None:
            return self.table
        return parse_table((_DATA / f"{self.name}.json").read_text("utf-8"))

    @cached_property
    def original(self) -> Mapping[str, Mapping[str, str]]:
        """Component -> our module path -> the path in the original (LDM) code's names.

        Only for components whose naming differs from ours by more than a prefix.
        """
        return {
            component: original.ldm_unet_names(self.components[component])
            for component, (_, naming) in self.single_file.items()
            if naming == "ldm"
        }

    @cached_property
    def by_path(self) -> Mapping[str, Mapping[str, str]]:
        """Component -> dotted path in any naming -> our module path."""
        return {component: self._paths(component) for component in self.components}

    @cached_property
    def by_flat_path(self) -> Mapping[str, Mapping[str, str]]:
        """The same for paths whose dots became underscores, as kohya and LyCORIS write them."""
        flat: dict[str, dict[str, str]] = {}
        for component, paths in self.by_path.items():
            flat[component] = {}
            for path, module in paths.items():
                _add(flat[component], path.replace(".", "_"), module)
        return flat

    def _paths(self, component: str) -> dict[str, str]:
        paths: dict[str, str] = {}
        for path, module in self.components[component].items():
            if not module.takes_adapters:
                continue
            _add(paths, path, path)
            _add(paths, path.removeprefix(TEXT_MODEL), path)
            if component in self.original:
                _add(paths, self.original[component][path], path)
        return paths

    def single_file_place(self, component: str, module: str, parameter: str = "weight") -> Place:
        """Where a module's weight or bias lies in an LDM single file."""
        prefix, naming = self.single_file[component]
        if naming == "ldm":
            return Place(f"{prefix}{self.original[component][module]}.{parameter}")
        if naming == "hf":
            return Place(f"{prefix}{module}.{parameter}")
        width = self.components[component][f"{TEXT_MODEL}final_layer_norm"].shape[0]
        name, rows, is_transposed = original.openclip_place(module, parameter, width)
        return Place(prefix + name, rows, is_transposed)


def _add(paths: dict[str, str], path: str, module: str) -> None:
    assert paths.setdefault(path, module) == module, f"{path} names two modules"


def parse_table(text: str) -> dict[str, dict[str, Module]]:
    """A generated table: {component: {module: [kind, weight shape, has bias]}}."""
    return {
        component: {
            path: Module(kind, tuple(shape), has_bias)
            for path, (kind, shape, has_bias) in modules.items()
        }
        for component, modules in json.loads(text).items()
    }
