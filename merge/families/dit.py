"""What diffusion transformers have in common: how their files are spelled, and their encoders."""

from collections.abc import Mapping
from dataclasses import dataclass

from merge.families.family import COMFY_DENOISER, Family, comfy_encoder
from merge.families.layers import ORIGINAL, OWN
from merge.families.tables import Table

TRANSFORMER = "transformer"
# A file of the denoiser alone has no prefix; all-in-one files and repacked ones have one.
_FILE_PREFIXES = ("", "model.diffusion_model.", COMFY_DENOISER)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A text encoder: its table, ComfyUI's name, and the prefixes that kohya's trainers give it."""

    model: str
    comfy: str
    kohya: tuple[str, ...]


def dit(
    name: str,
    title: str,
    architecture: str,
    base_versions: tuple[str, ...] = (),
    *,
    model: str | Table | None = None,
    encoders: Mapping[str, Encoder] | None = None,
    naming: str = ORIGINAL,
    comfy_naming: str | None = None,
    experts: int = 1,
    widths: Mapping[str, tuple[int, ...]] | None = None,
    optional: tuple[str, ...] = (),
    hints: tuple[str, ...] = (),
    alike: str = "",
) -> Family:
    """A family whose denoiser is a transformer, in files and adapters named `naming`.

    `comfy_naming` is ComfyUI's where it differs. `experts` of 2 adds a `transformer_2`.
    """
    encoders = encoders or {}
    comfy_naming = comfy_naming or naming
    model = model or name
    denoisers = (TRANSFORMER, "transformer_2")[:experts]
    files = {prefix: (naming, comfy_naming) for prefix in _FILE_PREFIXES}
    spellings = [(prefix, n) for prefix, names in files.items() for n in dict.fromkeys(names)]
    return Family(
        name=name,
        title=title,
        architecture=architecture,
        base_versions=base_versions or (name,),
        models={n: model for n in denoisers} | {c: e.model for c, e in encoders.items()},
        kohya={TRANSFORMER: ("lora_unet", "lora_transformer")}
        | {component: encoder.kohya for component, encoder in encoders.items()},
        comfy={TRANSFORMER: COMFY_DENOISER}
        | {component: comfy_encoder(encoder.comfy) for component, encoder in encoders.items()},
        single_file={TRANSFORMER: tuple(spellings)}
        | {c: ((comfy_encoder(e.comfy), OWN),) for c, e in encoders.items()},
        kohya_naming={TRANSFORMER: naming},
        comfy_naming={TRANSFORMER: comfy_naming},
        widths=widths or {},
        optional=optional,
        hints=hints,
        alike=alike,
    )
