"""The strings of `__metadata__` that we read, and the ones we write.

Everything here is text that a trainer or an editor wrote: a hint for people, never a fact.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# What we write into files of our own.
FORMAT = "format"  # "pt", which the readers of other tools expect
GRAFT_VERSION = "graft.version"
GRAFT_RECIPE = "graft.recipe"  # canonical JSON
GRAFT_RECIPE_DIGEST = "graft.recipe_digest"  # "sha256:…" of that JSON
GRAFT_PARENTS = "graft.parents"  # JSON: recipes of files it was made of, by their SHA-256
GRAFT_CERTIFICATE = "graft.certificate"  # JSON: inputs, method, truncation and rounding errors
GRAFT_TRIGGERS = "graft.triggers"  # JSON list of strings
GRAFT_CONVERTED_FROM = "graft.converted_from"  # "sha256:…" of the file that was converted
GRAFT_PACKED = (
    "graft.packed"  # JSON: packed layer -> its parts -> [rank, alpha, dtypes of up, down]
)
GRAFT_BASE_SHA256 = "graft.base_sha256"  # of the base a file was trained on or baked into

# What others write and we read (sd-scripts, ModelSpec 1.0.1, diffusers).
BASE_VERSION = "ss_base_model_version"
NETWORK_MODULE = "ss_network_module"
NETWORK_DIM = "ss_network_dim"
NETWORK_ALPHA = "ss_network_alpha"
NETWORK_ARGS = "ss_network_args"
OUTPUT_NAME = "ss_output_name"
DATASETS = "ss_datasets"
DATASET_DIRS = "ss_dataset_dirs"
TAG_FREQUENCY = "ss_tag_frequency"
DATA_HASH = "sshs_model_hash"
ARCHITECTURE = "modelspec.architecture"
TITLE = "modelspec.title"
TRIGGER_PHRASE = "modelspec.trigger_phrase"
USAGE_HINT = "modelspec.usage_hint"
ONETRAINER_CONFIG = "ot_config"  # JSON: its training settings
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # JSON: "<component>.r", "<component>.lora_alpha", …


@dataclass(frozen=True, slots=True)
class Trigger:
    """A word that calls what an adapter learned, with the key it was found under."""

    word: str
    source: str
    confidence: float


def read_json(metadata: Mapping[str, str], key: str) -> Any:
    """The JSON text under `key`, or None where there is none: trainers write "None" and worse."""
    try:
        return json.loads(metadata.get(key, "null"))
    except (ValueError, RecursionError):
        return None


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The words of `triggers`, best evidence first."""
    return [trigger.word for trigger in triggers(metadata)]


def triggers(metadata: Mapping[str, str]) -> list[Trigger]:
    """Words that call the adapter, by falling confidence, each once.

    The order of evidence is: what the author states, then what the training set was called,
    then tags that stand in nearly every caption.
    """
    found: dict[str, Trigger] = {}
    for trigger in _evidence(metadata):
        word = trigger.word.strip()
        if word and word.lower() not in found:
            found[word.lower()] = Trigger(word, trigger.source, trigger.confidence)
    return list(found.values())


def _evidence(metadata: Mapping[str, str]) -> Iterator[Trigger]:
    ours = read_json(metadata, GRAFT_TRIGGERS)
    if isinstance(ours, list):
        yield from (Trigger(word, GRAFT_TRIGGERS, 1.0) for word in ours if isinstance(word, str))
    phrase = metadata.get(TRIGGER_PHRASE, "")
    yield from (Trigger(word, TRIGGER_PHRASE, 0.95) for word in phrase.split(","))
    for source, folder, n_images in _folders(metadata):
        # kohya's folder name is "<repeats>_<class tokens>": "10_mychar woman".
        named = re.fullmatch(r"\d+_(.+)", folder)
        if named:
            yield Trigger(named[1], source, 0.8)
        yield from _constant_tags(metadata, folder, n_images)
    for subset in _subsets(metadata):
        tokens = subset.get("class_tokens")
        if isinstance(tokens, str) and tokens != "None":
            yield Trigger(tokens, DATASETS, 0.8)


def _folders(metadata: Mapping[str, str]) -> Iterator[tuple[str, str, int]]:
    folders = read_json(metadata, DATASET_DIRS)
    if not isinstance(folders, dict):
        return
    for folder, facts in folders.items():
        count = facts.get("img_count") if isinstance(facts, dict) else None
        yield DATASET_DIRS, folder, count if isinstance(count, int) else 0


def _subsets(metadata: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    datasets = read_json(metadata, DATASETS)
    for dataset in datasets if isinstance(datasets, list) else []:
        subsets = dataset.get("subsets") if isinstance(dataset, dict) else None
        for subset in subsets if isinstance(subsets, list) else []:
            if isinstance(subset, dict) and not subset.get("is_reg"):
                yield subset


# Tags that stand in nearly every caption of nearly every set, and so call nothing.
_GENERIC = {"1girl", "1boy", "solo", "looking at viewer", "simple background", "white background"}
_CONSTANT_SHARE = 0.95
_FEWEST_IMAGES = 5


def _constant_tags(metadata: Mapping[str, str], folder: str, n_images: int) -> Iterator[Trigger]:
    if n_images < _FEWEST_IMAGES:
        return
    for tag, count in tag_counts(metadata, folder).most_common(5):
        if tag not in _GENERIC and count >= _CONSTANT_SHARE * n_images:
            yield Trigger(tag, TAG_FREQUENCY, 0.5)


def tag_counts(metadata: Mapping[str, str], folder: str | None = None) -> Counter[str]:
    """How often each caption tag occurs, in one training folder or over all of them."""
    frequency = read_json(metadata, TAG_FREQUENCY)
    counts: Counter[str] = Counter()
    if not isinstance(frequency, dict):
        return counts
    for name, tags in frequency.items():
        if (folder is None or name == folder) and isinstance(tags, dict):
            for tag, count in tags.items():
                if isinstance(count, int):
                    counts[tag.strip()] += count
    return counts
