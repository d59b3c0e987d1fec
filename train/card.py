"""README.md of a result: front matter the Hugging Face Hub understands, then what a user needs."""

from collections.abc import Sequence
from typing import Any

import yaml

from train.config import BUILT_IN
from train.run import Run

BUILT_IN_REPO = f"demo/{BUILT_IN}"
MEASURED = (
    "Measured after rounding to the file's dtype, "
    "with the same prompts and seeds for adapter and base."
)
SCORES = {
    "score": "style or concept with the trigger, 1 is a perfect rendering",
    "base_score": "the same prompts on the base alone",
    "present": "share of pictures that have it",
    "content": "share of pictures with the trigger that show the object asked for",
    "leak": "how much of it appears without the trigger, above the base",
    "forgetting": "share of known scenes the base paints right and the adapter loses",
    "drift": "mean pixel difference to the base without the trigger",
}


def card(run: Run, file: str, samples: Sequence[tuple[str, str]], cover: str | None) -> str:
    """`samples` are (path, prompt)."""
    config = run.config
    # Hubs show the first widget as the repo's picture.
    shown = [(cover, ", ".join(run.triggers)), *samples] if cover else samples
    front = yaml.safe_dump(_front_matter(run, shown), sort_keys=False, allow_unicode=True)
    sections = [
        f"# {config.title or config.name}",
        config.description,
        "<Gallery />",
        "## Trigger words",
        "\n".join(f"- `{trigger}`" for trigger in run.triggers),
        _class_word(run),
        "Strengths from 0.6 to 1.0 are a good start; 0 is the base, exactly.",
        "## Use",
        _snippet(run, file, samples[0][1] if samples else run.triggers[0]),
        "## Training",
        _table(_training_rows(run)),
        "## Evaluation",
        MEASURED,
        _table([(name, f"{run.scores[name]:.3f}", SCORES[name]) for name in run.scores]),
        "## Data",
        _data_statement(run),
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(part for part in sections if part) + "\n"


def _front_matter(run: Run, samples: Sequence[tuple[str, str]]) -> dict[str, Any]:
    config = run.config
    family = run.base.family
    tags = ["text-to-image", "diffusers", "lora", "template:sd-lora", family, *config.output.tags]
    return {
        "license": config.output.license,
        "library_name": "peft" if config.output.dialect == "peft" else "diffusers",
        # A local folder's name would be read as somebody's repo.
        **(
            {"base_model": _repo(run), "base_model_relation": "adapter"}
            if "/" in _repo(run)
            else {}
        ),
        "pipeline_tag": "text-to-image",
        "tags": list(dict.fromkeys(tags)),
        "instance_prompt": run.triggers[0],
        "widget": [{"text": prompt, "output": {"url": path}} for path, prompt in samples],
    }


def _repo(run: Run) -> str:
    """Where users load the base from: hubs keep the built-in one among their demo repos."""
    return BUILT_IN_REPO if run.base.label == BUILT_IN else run.base.label.partition("@")[0]


def _class_word(run: Run) -> str:
    word = run.config.class_word
    return f"The trigger stands for a {word}." if word else ""


def _snippet(run: Run, file: str, prompt: str) -> str:
    if run.config.output.dialect == "peft":
        imports = ["from peft import PeftModel"]
        load = 'pipe.unet = PeftModel.from_pretrained(pipe.unet, "folder/or/repo")'
    else:
        imports = []
        load = f'pipe.load_lora_weights("folder/or/repo", weight_name="{file}")'
    lines = [
        "```python",
        "from diffusers import StableDiffusionPipeline",
        *imports,
        "",
        f'pipe = StableDiffusionPipeline.from_pretrained("{_repo(run)}")',
        load,
        f'image = pipe("{prompt}").images[0]',
        "```",
    ]
    return "\n".join(lines)


def _training_rows(run: Run) -> list[tuple[str, str]]:
    config = run.config
    share = 100 * run.trainable / run.total
    classes = config.class_images
    return [
        ("base", f"{run.base.label}, sha256 `{run.base.sha256}`"),
        ("targets, rank, alpha", f"{config.targets}, {config.rank}, {run.alpha:g}"),
        ("trained parameters", f"{run.trainable:,} of {run.total:,} ({share:.2f} %)"),
        ("images", str(len(run.report.examples))),
        ("class images", f"{classes.count}, {classes.share:.0%} of a batch" if classes else "none"),
        ("steps, batch", f"{config.steps}, {config.batch}"),
        (
            "optimizer",
            f"{config.optimizer}, {config.learning_rate:g}, {config.schedule}",
        ),
        ("resolution", f"{run.resolution} x {run.resolution}"),
        ("weight decay", f"{config.weight_decay:g}"),
        ("seed", str(config.seed)),
        ("file", f"{config.output.dialect} keys, {config.output.dtype}"),
    ]


def _data_statement(run: Run) -> str:
    dataset = run.config.dataset
    if dataset.folder is None:
        source = "All pictures were drawn by the tiny pipeline's own renderer."
    else:
        source = "The pictures are the author's; their names and places are not recorded here."
    terms = f" Licence of the data: {dataset.license}." if dataset.license else ""
    return f"{source}{terms}\nFingerprint of images and captions: `{run.report.fingerprint()}`."


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    width = len(rows[0])
    head = ["| " + " | ".join([""] * width) + " |", "|" + "---|" * width]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)])
