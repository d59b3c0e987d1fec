"""What a person asks a training run for: one YAML file, unknown fields refused."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from train.errors import BadConfig

TargetPreset = Literal["xattn-kv", "xattn", "attn", "attn+ff", "all-linear", "all+conv"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
Words = Annotated[str, Field(min_length=1, max_length=500)]

BUILT_IN = "tiny-sd"
"""The base that comes with the package."""

NOT_TRAINING: Any = {
    **dict.fromkeys(("title", "description", "samples", "checkpoint_every", "output"), True),
    # Checkpoints record the fingerprints of what lies there, so folders may move.
    "base": True,
    "dataset": {"folder"},
}
"""Fields that change what is reported, not the weights; a resumed run may change them."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dataset(_Section):
    """Where the images come from: exactly one of `folder`, `style` and `concept`."""

    folder: Path | None = Field(
        None, description="images, each with its caption in a .txt file of the same name"
    )
    caption: Words | None = Field(
        None, description="caption of images without a .txt file; without it they are an error"
    )
    style: str | None = Field(None, description="a new style of the tiny pipeline's own renderer")
    concept: str | None = Field(
        None, description="a new concept of the tiny pipeline's own renderer"
    )
    count: int = Field(64, ge=1, le=10_000, description="pictures to render for style or concept")
    license: str | None = Field(None, description="licence of the images, for the record")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("folder", "style", "concept") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"needs exactly one of folder, style and concept, but has {found}")
        return self


class ClassImages(_Section):
    """Prior preservation (Ruiz et al. 2022, arXiv:2208.12242, eq. 2): pictures of the base itself.

    Each batch mixes them in, so that prompts without the trigger keep their look.
    """

    share: float = Field(0.5, gt=0, lt=1, description="share of each batch")
    count: int = Field(32, ge=1, le=10_000, description="pictures the base makes before training")
    prompts: tuple[Words, ...] = Field(
        (),
        description="what they show; by default the captions with the trigger replaced by the "
        "class word, or for rendered data every scene the tiny base knows",
    )
    steps: int = Field(20, ge=1, le=1000, description="sampler steps of each picture")
    guidance: float = Field(3.0, ge=0, description="classifier-free guidance of each picture")


class Samples(_Section):
    """Pictures made while training and of the finished adapter."""

    prompts: tuple[Words, ...] = Field(
        (), description="by default some of the captions, one per picture"
    )
    every: int = Field(
        0, ge=0, description="steps between sample pictures; 0 means only at the end"
    )
    steps: int = Field(20, ge=1, le=1000, description="sampler steps")
    guidance: float = Field(3.0, ge=0, description="classifier-free guidance")
    seed: int = Field(1, ge=0, description="seed of the first picture; the next ones count up")


class Output(_Section):
    """How the adapter is written and what its file and card say."""

    dialect: Literal["kohya", "diffusers", "peft"] = Field(
        "kohya",
        description="key spelling: kohya with .alpha tensors loads nearly everywhere; diffusers "
        "keeps alpha in the header; peft is a folder with adapter_config.json",
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="of the written factors; scores are measured after this rounding"
    )
    license: str = Field("other", description="licence of the adapter, an SPDX or Hub identifier")
    author: str | None = Field(None, description="who made it")
    tags: tuple[str, ...] = Field((), description="words for the card and the catalogue")
    privacy: Literal["full", "tags", "minimal"] = Field(
        "tags",
        description="full names the dataset folder, tags counts caption words under a neutral "
        "name, minimal writes neither; absolute paths are never written",
    )


class TrainConfig(_Section):
    """One LoRA training run (Hu et al. 2021, arXiv:2106.09685) on an SD-like UNet pipeline."""

    name: Name = Field(description="name of the result: NAME.safetensors in folder NAME")
    title: str | None = Field(None, description="how people call it; by default the name")
    description: str = Field("", description="one or two sentences for the card")
    base: str = Field(
        BUILT_IN,
        min_length=1,
        description="the built-in tiny-sd, a diffusers folder, or a REF such as namespace/name",
    )
    triggers: tuple[Words, ...] = Field(
        (), description="words that call the adapter; needed for a folder, known for rendered data"
    )
    class_word: str | None = Field(
        None, description="what the trigger is an instance of, as in 'a zorb' is a 'ring'"
    )
    dataset: Dataset = Field(description="images and captions")
    class_images: ClassImages | None = Field(
        default_factory=lambda: ClassImages.model_validate({}),
        description="prior preservation; null switches it off",
    )
    targets: TargetPreset = Field("attn", description="layers that get an adapter")
    rank: int = Field(8, ge=1, le=1024, description="inner dimension of every factor pair")
    alpha: float | None = Field(
        None, gt=0, description="the delta is alpha / rank times up @ down; by default the rank"
    )
    steps: int = Field(ge=1, le=1_000_000, description="optimizer steps")
    batch: int = Field(4, ge=1, le=1024, description="images per step, class images included")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="course of the learning rate after the warm-up"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising rate")
    optimizer: Literal["adamw", "adafactor"] = Field("adamw", description="torch.optim's")
    weight_decay: float = Field(0.01, ge=0, description="decoupled, as in AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of examples trained with an empty caption"
    )
    min_snr_gamma: float | None = Field(
        None, gt=0, description="weighting of Hang et al. 2023, arXiv:2303.09556; 5 is usual"
    )
    noise_offset: float = Field(
        0.0, ge=0, le=1, description="noise that is constant per image and channel, for dark looks"
    )
    resolution: int | None = Field(
        None, ge=16, le=4096, multiple_of=8, description="pixels; by default the base's own"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="decides the run, on a CPU bit for bit")
    samples: Samples = Field(
        default_factory=lambda: Samples.model_validate({}), description="pictures to make"
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen UNet; auto is bfloat16 on a GPU that has it"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto prefers cuda")
    threads: int | None = Field(
        None, ge=1, description="CPU threads of torch; the same number gives the same bits"
    )
    output: Output = Field(
        default_factory=lambda: Output.model_validate({}), description="file and card"
    )

    @field_validator("triggers")
    @classmethod
    def _triggers_are_words(cls, triggers: tuple[str, ...]) -> tuple[str, ...]:
        if any(trigger.strip() != trigger for trigger in triggers):
            raise ValueError("a trigger must not begin or end with a space")
        return triggers

    @model_validator(mode="after")
    def _folder_needs_trigger(self) -> Self:
        if self.dataset.folder is not None and not self.triggers:
            raise ValueError("a dataset from a folder needs at least one entry in triggers")
        if self.dataset.folder is None and self.base != BUILT_IN:
            raise ValueError("rendered styles and concepts are for the base tiny-sd only")
        return self

    @property
    def effective_alpha(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha

    def digest(self) -> str:
        """SHA-256 of the fields that decide the weights, as canonical JSON."""
        fields = self.model_dump(mode="json", exclude=NOT_TRAINING)
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def load_config(path: Path) -> TrainConfig:
    """Read a YAML file; a relative dataset folder or base path is relative to that file."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(str(path), "", error.strerror or "cannot be read") from error
    except UnicodeDecodeError as error:
        raise BadConfig(str(path), "", "is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise BadConfig(str(path), "", f"is not YAML: {_one_line(error)}") from error
    if not isinstance(fields, dict):
        raise BadConfig(str(path), "", "holds no fields; see the example in docs/training.md")
    config = parse_config(fields, str(path))
    return _anchored(config, path.parent)


def parse_config(fields: dict[str, Any], file: str = "config") -> TrainConfig:
    """Checked fields; the error names the first bad one and says how many more there are."""
    try:
        return TrainConfig.model_validate(fields)
    except ValidationError as error:
        first, *others = error.errors()
        param = ".".join(str(part) for part in first["loc"])
        detail = _DETAILS.get(first["type"], first["msg"].removeprefix("Value error, "))
        more = f" (and {len(others)} more)" if others else ""
        raise BadConfig(file, param, detail + more) from error


_DETAILS = {
    "extra_forbidden": "there is no such field",
    "missing": "is required",
}


def _anchored(config: TrainConfig, folder: Path) -> TrainConfig:
    update: dict[str, Any] = {}
    if config.dataset.folder is not None:
        dataset = {"folder": (folder / config.dataset.folder).resolve()}
        update["dataset"] = config.dataset.model_copy(update=dataset)
    if config.base.startswith((".", "/", "~")):
        update["base"] = str((folder / Path(config.base).expanduser()).resolve())
    return config.model_copy(update=update)


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())
