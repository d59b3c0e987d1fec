"""Diffusers folders: shards, variants, what is missing, and the digest."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge.errors import BadCheckpoint
from merge.formats.folders import folder_digest, read_component, read_folder, read_weight_map
from merge.formats.writer import write_file


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _make_folder(root: Path) -> Path:
    _write_json(
        root / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "safety_checker": [None, None],
        },
    )
    _write_json(root / "scheduler" / "scheduler_config.json", {})
    _write_json(root / "unet" / "config.json", {"cross_attention_dim": 32})
    _write_json(root / "text_encoder" / "config.json", {})
    weights = {"a.weight": np.ones(2)}
    write_file(root / "text_encoder" / "model.safetensors", weights, {})
    write_file(root / "text_encoder" / "model.fp16.safetensors", weights, {})
    shards = {
        "a.weight": "m-00001-of-00002.safetensors",
        "b.weight": "m-00002-of-00002.safetensors",
    }
    for key, name in shards.items():
        write_file(root / "unet" / name, {key: np.ones(2)}, {})
    for infix in ("", ".fp16"):
        index = root / "unet" / f"diffusion_pytorch_model.safetensors.index{infix}.json"
        _write_json(index, {"metadata": {"total_size": 32}, "weight_map": shards})
    return root


def test_components_shards_and_variants_are_found(tmp_path: Path) -> None:
    folder = read_folder(_make_folder(tmp_path))
    assert set(folder.components) == {"unet", "text_encoder"}
    unet = folder.components["unet"]
    assert [f.name for f in unet.files] == [
        "m-00001-of-00002.safetensors",
        "m-00002-of-00002.safetensors",
    ]
    assert unet.config["cross_attention_dim"] == 32
    assert read_weight_map(unet)["b.weight"] == "m-00002-of-00002.safetensors"
    assert [f.name for f in folder.components["text_encoder"].files] == ["model.safetensors"]
    fp16 = read_folder(tmp_path, variant="fp16")
    assert [f.name for f in fp16.components["text_encoder"].files] == ["model.fp16.safetensors"]
    assert fp16.components["unet"].index is not None


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda r: (r / "model_index.json").unlink(), "model_index.json: No such file"),
        (lambda r: (r / "model_index.json").write_text("{"), "model_index.json is not JSON"),
        (lambda r: (r / "model_index.json").write_text("[]"), "is not a JSON object"),
        (lambda r: (r / "model_index.json").write_text("{}"), "names no component"),
        (lambda r: (r / "unet/m-00002-of-00002.safetensors").unlink(), "which is missing"),
        (lambda r: (r / "text_encoder/model.safetensors").unlink(), "with its weights"),
        (
            lambda r: _write_json(
                r / "unet/diffusion_pytorch_model.safetensors.index.json",
                {"weight_map": {"a": "../text_encoder/model.safetensors"}},
            ),
            "puts a into '../text_encoder/model.safetensors'",
        ),
        (
            lambda r: _write_json(
                r / "unet/diffusion_pytorch_model.safetensors.index.json", {"weight_map": {}}
            ),
            "has no weight_map",
        ),
    ],
)
def test_a_broken_folder_is_one_sentence(break_it: Any, message: str, tmp_path: Path) -> None:
    root = _make_folder(tmp_path)
    break_it(root)
    with pytest.raises(BadCheckpoint, match=message):
        read_folder(root)


def test_a_variant_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="the variant bf16"):
        read_component(_make_folder(tmp_path) / "unet", variant="bf16")


def test_the_digest_is_its_definition_and_ignores_caches(tmp_path: Path) -> None:
    root = _make_folder(tmp_path)
    names = [f for f in root.rglob("*") if f.is_file()]
    lines = sorted(
        f"{f.relative_to(root).as_posix()}\0{hashlib.sha256(f.read_bytes()).hexdigest()}\n"
        for f in names
    )
    before = folder_digest(root)
    assert before == hashlib.sha256("".join(lines).encode()).hexdigest()
    (root / ".cache").mkdir()
    (root / ".cache" / "x.json").write_text("{}")
    (root / "README.md").write_text("a card")
    assert folder_digest(root) == before
    (root / "merged.safetensors").write_bytes(b"beside the pipeline")
    (root / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never copied")
    assert folder_digest(root) == before
    _write_json(root / "unet" / "config.json", {"cross_attention_dim": 64})
    assert folder_digest(root) != before


def test_the_digest_tells_tokenizers_apart(tmp_path: Path) -> None:
    root = _make_folder(tmp_path)
    digests = set()
    for merges in (None, "a b", "b a"):
        if merges is not None:
            (root / "tokenizer").mkdir(exist_ok=True)
            (root / "tokenizer" / "merges.txt").write_text(merges)
        digests.add(folder_digest(root))
    assert len(digests) == 3


def test_the_digest_of_a_folder_without_a_pipeline_counts_its_files(tmp_path: Path) -> None:
    digests = set()
    for config in ({"r": 1}, {"r": 2}):
        _write_json(tmp_path / "adapter_config.json", config)
        digests.add(folder_digest(tmp_path))
    write_file(tmp_path / "adapter_model.safetensors", {"a.weight": np.ones(2)}, {})
    digests.add(folder_digest(tmp_path))
    assert len(digests) == 3
