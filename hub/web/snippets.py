"""How to use a file: text to copy, with this hub's own address in it."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import quote

from hub.adapters.items import AdapterItem
from hub.adapters.models import Kind
from merge.families import FAMILIES

PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Way:
    """One tool; `note` is a sentence below the text."""

    name: str
    text: str
    note: str = ""


def ways_to_use(
    item: AdapterItem | None,
    repo: str,
    paths: Sequence[str],
    base_model: str | None,
    base_url: str,
) -> list[Way]:
    """The tools that can take what this repo holds, the likeliest first."""
    found = []
    if "model_index.json" in paths:
        found.append(Way("diffusers", _pipeline(repo, base_url)))
    elif item is not None and item.kind == Kind.ADAPTER:
        if _is_peft(item, paths):
            found.append(Way("peft", _peft(item, base_model, base_url)))
        else:
            note = "" if base_model else "Put the base model that the adapter was made for first."
            if item.algorithm not in (None, "lora"):
                note = "diffusers loads LoRA alone: graft convert --algorithm lora, or graft bake."
            found.append(Way("diffusers", _diffusers(item, base_model, base_url), note))
    if item is not None or paths:
        found.append(Way("graft", _graft(repo, base_url)))
    if item is not None:
        found.append(Way("curl", _curl(item, base_url)))
    return found


def _is_peft(item: AdapterItem, paths: Sequence[str]) -> bool:
    folder = PurePosixPath(item.file).parent
    return str(folder / PEFT_CONFIG) in paths


def _environment(base_url: str) -> str:
    # Before the import: huggingface_hub reads it once.
    return f'import os\n\nos.environ["HF_ENDPOINT"] = {_text(base_url)}\n\n'


def _pipeline(repo: str, base_url: str) -> str:
    return (
        _environment(base_url) + "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({_text(repo)})\n"
        f'image = pipe("a red circle on blue").images[0]\n'
    )


def _diffusers(item: AdapterItem, base_model: str | None, base_url: str) -> str:
    prompt = ", ".join(item.trigger_words[:1]) or "…"
    folder, _, name = item.file.rpartition("/")
    subfolder = f", subfolder={_text(folder)}" if folder else ""
    return (
        _environment(base_url) + "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({_text(base_model or 'BASE_MODEL')})\n"
        f"pipe.load_lora_weights({_text(item.repo)}{subfolder}, weight_name={_text(name)})\n"
        f"image = pipe({_text(prompt)}).images[0]\n"
    )


def _peft(item: AdapterItem, base_model: str | None, base_url: str) -> str:
    folder = item.file.rpartition("/")[0]
    subfolder = f", subfolder={_text(folder)}" if folder else ""
    family = FAMILIES.get(item.family or "")
    if family is not None:
        model = f"pipe.{family.denoiser}"
        return (
            _environment(base_url) + "from diffusers import DiffusionPipeline\n"
            "from peft import PeftModel\n\n"
            f"pipe = DiffusionPipeline.from_pretrained({_text(base_model or 'BASE_MODEL')})\n"
            f"{model} = PeftModel.from_pretrained({model}, {_text(item.repo)}{subfolder})\n"
        )
    return (
        _environment(base_url) + "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({_text(base_model or 'BASE_MODEL')})\n"
        f"model = PeftModel.from_pretrained(base, {_text(item.repo)}{subfolder})\n"
    )


def _graft(repo: str, base_url: str) -> str:
    return f"export GRAFT_ENDPOINT={shlex.quote(base_url)}\ngraft pull {shlex.quote(repo)}"


def _curl(item: AdapterItem, base_url: str) -> str:
    address = f"{base_url}/{item.repo}/resolve/main/{quote(item.file)}"
    name = PurePosixPath(item.file).name
    check = f"echo {shlex.quote(f'{item.sha256}  {name}')} | sha256sum --check"
    return f"curl -L -C - -o {shlex.quote(name)} {shlex.quote(address)}\n{check}"


def _text(value: str) -> str:
    """A string literal that Python reads back as `value`."""
    return json.dumps(value, ensure_ascii=False)
