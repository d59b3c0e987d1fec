"""What a family of base models is: its modules, their names, and where checkpoints hold them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from merge.families.layers import (
    ORIGINAL,
    OWN,
    PARAMETER,
    Layer,
    Module,
    Place,
    Run,
    own_layer,
    parameter_key,
)
from merge.families.tables import TEXT_MODEL, Table, read_table

__all__ = [
    "COMFY_DENOISER",
    "DENOISER",
    "OPENCLIP",
    "ORIGINAL",
    "OWN",
    "PARAMETER",
    "TEXT_MODEL",
    "UNET_WIDTHS",
    "Family",
    "Layer",
    "Module",
    "Place",
    "Run",
    "Table",
    "comfy_encoder",
    "own_layer",
    "parameter_key",
]

# What kohya's lora_unet_ and ComfyUI's diffusion_model. mean: the denoiser, whatever it is called.
DENOISER = "denoiser"
_DENOISERS = ("unet", "transformer", "transformer_2")  # the last is Wan 2.2's low-noise expert
_TEXT_ENCODER = "text_encoder"
COMFY_DENOISER = "diffusion_model."
OPENCLIP = "openclip"  # a layout of checkpoints alone: no adapter is named so
# The first convolution takes 4 latent channels; 8 for InstructPix2Pix, 9 for inpainting.
UNET_WIDTHS = {"conv_in": (4, 8, 9)}


def comfy_encoder(name: str) -> str:
    """ComfyUI's beginning of a text encoder's keys; in the names of transformers."""
    return f"text_encoders.{name}.transformer."


@dataclass(frozen=True)
class Family:
    """Base models with the same keys and shapes.

    Module paths are diffusers' and transformers' own, text encoders always with `text_model.`.
    `models` names each component's table; equal encoders share one.
    `kohya` holds the prefixes of kohya's underscore names per component, the one we write first;
    `comfy` what stands before the dotted paths of ComfyUI's adapters.
    `kohya_naming` and `comfy_naming` say in which naming those dialects are written, where it is
    not our own.
    `single_file` holds what stands before a component's keys in single files, and the naming there:
    "own", "original" or "openclip".
    `widths` are the inputs that variants of the base give a layer of the denoiser: inpainting, edit
    and control models have more channels. `optional` are beginnings of paths in the denoiser that
    some variants lack. `hints` are beginnings of what trainers call the base, in lower case, and
    `alike` names models that keys and shapes cannot tell from it.
    """

    name: str
    title: str
    architecture: str  # modelspec.architecture without the adapter part
    base_versions: tuple[str, ...]  # ss_base_model_version, the one we write first
    models: Mapping[str, str | Table]
    kohya: Mapping[str, tuple[str, ...]]
    single_file: Mapping[str, tuple[tuple[str, str], ...]]
    comfy: Mapping[str, str] = field(default_factory=dict)
    kohya_naming: Mapping[str, str] = field(default_factory=dict)
    comfy_naming: Mapping[str, str] = field(default_factory=dict)
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    alike: str = ""

    @cached_property
    def denoiser(self) -> str:
        """The component that makes the image: "unet" or "transformer"."""
        return next(name for name in _DENOISERS if name in self.models)

    @cached_property
    def tables(self) -> Mapping[str, Table]:
        return {
            component: read_table(model) if isinstance(model, str) else model
            for component, model in self.models.items()
        }

    @cached_property
    def components(self) -> Mapping[str, Mapping[str, Module]]:
        """Component -> our module path -> module, generated from the model classes."""
        return {component: table.modules for component, table in self.tables.items()}

    @cached_property
    def layers(self) -> Mapping[str, Mapping[str, Mapping[str, Layer]]]:
        """Component -> naming -> path -> layer."""
        return {component: table.layers for component, table in self.tables.items()}

    def find(
        self,
        component: str | None,
        path: str,
        *,
        is_flat: bool,
        extent: tuple[int, int] | None = None,
    ) -> tuple[str, Layer] | None:
        """(component, layer) that a path in any naming points to, or None.

        Where the file leaves the component open, and where te1, te2 and te3 mean different encoders
        to different trainers, `extent`, (out, in * kernel) of the adapter's delta, decides.
        """
        first = None
        for name in self._reachable(component):
            table = self.tables[name]
            layer = table.by_flat_path.get(path) if is_flat else table.by_path.get(path)
            if layer is None:
                continue
            layer = self._widened(name, layer, extent)
            if layer.extent == extent:
                return name, layer
            first = first or (name, layer)
            if name == component and not is_flat:
                break
        return first

    def _reachable(self, component: str | None) -> Iterable[str]:
        if component is None:
            return self.models
        if component == DENOISER:
            return (self.denoiser,)
        named = [component] if component in self.models else []
        if not component.startswith(_TEXT_ENCODER):
            return named
        encoders = (name for name in self.models if name.startswith(_TEXT_ENCODER))
        return [*named, *(name for name in encoders if name != component)]

    def _widened(self, component: str, layer: Layer, extent: tuple[int, int] | None) -> Layer:
        """The layer as a variant of the base has it, if that is what the delta fits."""
        widths = self.widths.get(layer.module or "", ())
        if not widths or extent in (None, layer.extent) or component not in _DENOISERS:
            return layer
        out, _, *kernel = layer.shape
        for width in widths:
            wider = replace(layer, shape=(out, width, *kernel))
            if wider.extent == extent:
                return wider
        return layer

    def accepts(self, component: str, layer: Layer, shape: tuple[int, ...]) -> bool:
        """Whether a base of this family may have the layer in that shape."""
        if shape == layer.shape or not shape:
            return shape == layer.shape
        if component not in _DENOISERS or (shape[0], *shape[2:]) != (
            layer.shape[0],
            *layer.shape[2:],
        ):
            return False
        return len(shape) > 1 and shape[1] in self.widths.get(layer.module or "", ())

    def is_optional(self, component: str, layer: Layer) -> bool:
        """Whether bases of this family may lack the layer."""
        return component in _DENOISERS and all(
            run.module.startswith(self.optional) for run in layer.runs
        )
