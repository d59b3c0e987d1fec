"""One training run through the front door: what it changes, what it refuses, what it leaves."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from PIL import Image

from merge.formats.header import read_header
from merge.formats.metadata import trigger_words
from merge.formats.reader import TensorFile
from tests.fixtures.pipelines import save_random_pipeline
from train import sd15
from train.base import load_base
from train.config import TrainConfig
from train.errors import (
    BadBase,
    BaseChanged,
    CannotResume,
    Interrupted,
    NoGradient,
    NonFiniteLoss,
    OutOfMemory,
    OutputExists,
)
from train.inject import inject, require_gradients, target_modules
from train.manifest import read_manifest
from train.presets import PRESETS
from train.result import Result
from train.sd15 import train

Make = Callable[..., TrainConfig]


@pytest.fixture
def run(config: Make, tmp_path: Path) -> Callable[..., Result]:
    def start(**fields: Any) -> Result:
        return train(config(**fields), tmp_path / "toy")

    return start


def load(base: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe: StableDiffusionPipeline) -> Any:
    return pipe(
        "a sks circle",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1),
    ).images[0]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with TensorFile(path) as file:
        return {key: file.read_tensor(key) for key in file.header.tensors}


def digest_of(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


# What a run does


def test_only_the_adapter_is_trained_and_the_base_keeps_its_bytes(base: Path) -> None:
    before = digest_of(base)
    loaded = load_base("base", base, torch.device("cpu"), torch.float32)
    adapter = inject(loaded.unet, "attn", 4, 4.0)
    trainable = [p for p in loaded.unet.parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(adapter.pairs)
    assert adapter.count() == sum(p.numel() for p in trainable)
    by_hand = sum(4 * sum(m.shape) for m in _weights(base, adapter))
    assert adapter.count() == by_hand
    assert digest_of(base) == before


def _weights(base: Path, adapter: Any) -> list[torch.Tensor]:
    tensors = tensors_of(base / "unet" / "diffusion_pytorch_model.safetensors")
    return [tensors[f"{pair.module}.weight"] for pair in adapter.pairs]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_names_layers_and_larger_ones_contain_smaller_ones(
    base: Path, preset: str
) -> None:
    unet = load_base("base", base, torch.device("cpu"), torch.float32).unet
    order = list(PRESETS)
    modules = set(target_modules(unet, preset))
    assert modules
    smaller = order[: order.index(preset)]
    assert all(set(target_modules(unet, name)) < modules for name in smaller)


def test_the_count_for_stable_diffusion_is_that_of_its_real_shapes() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    weights = {name: m.weight for name, m in unet.named_modules() if hasattr(m, "weight")}
    for name, preset in PRESETS.items():
        shapes = [weights[module].shape for module in target_modules(unet, name)]
        assert preset.sd15_rank8 == sum(8 * (s[0] + s[1:].numel()) for s in shapes)


def test_a_run_moves_every_module_and_says_what_it_does(
    config: Make, base: Path, tmp_path: Path
) -> None:
    before = digest_of(base)
    seen: list[dict[str, Any]] = []
    result = train(config(), tmp_path / "toy", listener=seen.append)
    assert digest_of(base) == before
    tensors = tensors_of(result.file)
    ups = [key for key in tensors if key.endswith("lora_up.weight")]
    assert ups
    assert all(tensors[key].any() for key in ups)
    names = [event["event"] for event in seen]
    assert names.count("step") == 4
    assert names.index("start") < names.index("step")
    assert names[-1] == "finish"
    start = seen[names.index("start")]
    assert (start["trainable"], start["total"]) == (result.trainable, result.total)
    lines = (tmp_path / "toy.run" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == seen


def test_two_runs_give_the_same_bits_and_another_seed_does_not(
    config: Make, tmp_path: Path
) -> None:
    first = tensors_of(train(config(), tmp_path / "a").file)
    # Samples on the way must not disturb the noise that training draws.
    again = tensors_of(
        train(config(samples={"steps": 2, "prompts": ["x"], "every": 1}), tmp_path / "b").file
    )
    other = tensors_of(train(config(seed=1), tmp_path / "c").file)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_fixed_clock_gives_the_same_folder_byte_for_byte(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first, second = (train(config(), tmp_path / name).folder for name in ("a", "b"))
    assert digest_of(first) == digest_of(second)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_both_targets_and_optimizers_train(
    config: Make, tmp_path: Path, prediction: str, optimizer: str
) -> None:
    base = save_random_pipeline(tmp_path / "base", prediction)
    fields = {"min_snr_gamma": 5, "noise_offset": 0.05, "schedule": "linear", "warmup": 0.5}
    result = train(config(base=str(base), optimizer=optimizer, **fields), tmp_path / "toy")
    expected = {"epsilon": "epsilon", "v_prediction": "v"}[prediction]
    assert read_header(result.file).metadata["modelspec.prediction_type"] == expected


def test_min_snr_weights_are_those_of_the_paper(base: Path, config: Make) -> None:
    scheduler = load_base("b", base, torch.device("cpu"), torch.float32).noise_scheduler()
    times = torch.tensor([0, 100, 500, 999])
    kept = scheduler.alphas_cumprod.double()[times]
    snr = kept / (1 - kept)
    for kind, divisor in (("epsilon", snr), ("v_prediction", snr + 1)):
        scheduler.register_to_config(prediction_type=kind)
        expected = torch.minimum(snr, torch.full_like(snr, 5.0)) / divisor
        found = sd15._weight(config(min_snr_gamma=5.0), scheduler, times)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_the_share_of_class_images_holds_over_time_even_for_batches_of_one(config: Make) -> None:
    wish = config(batch=1, class_images={"share": 0.25, "count": 2, "steps": 2})
    batches = [sd15._batch(wish, step, 3) for step in range(48)]
    own = [index for chosen, _ in batches for index in chosen]
    assert sum(len(prior) for _, prior in batches) == 12
    assert len(own) == 36
    assert [own.count(index) for index in range(3)] == [12, 12, 12]


# What it leaves


def test_the_folder_is_complete_and_its_manifest_true(run: Callable[..., Result]) -> None:
    result = run(samples={"steps": 2, "prompts": ["a sks circle", "a sks square"]})
    manifest = read_manifest(result.folder)
    assert set(manifest.files) == {
        "README.md",
        "config.yaml",
        "metrics.json",
        "samples/00.png",
        "samples/01.png",
        "samples/cover.webp",
        "toy.safetensors",
    }
    assert manifest.files["toy.safetensors"].sha256 == result.sha256
    assert [path.name for path in result.folder.parent.iterdir() if path.name[0] == "."] == []
    run_folder = result.folder.with_name("toy.run")
    assert sorted(path.name for path in run_folder.iterdir()) == ["events.jsonl"]


REQUIRED = [
    "format",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_v2",
    "ss_output_name",
    "ss_steps",
    "ss_epoch",
    "ss_num_train_images",
    "ss_num_reg_images",
    "ss_learning_rate",
    "ss_unet_lr",
    "ss_optimizer",
    "ss_lr_scheduler",
    "ss_resolution",
    "ss_tag_frequency",
    "ss_dataset_dirs",
    "ss_seed",
    "ss_mixed_precision",
    "ss_min_snr_gamma",
    "ss_noise_offset",
    "ss_caption_dropout_rate",
    "ss_training_started_at",
    "ss_training_finished_at",
    "ss_training_comment",
    "ss_sd_model_name",
    "ss_sd_model_hash",
    "ss_new_sd_model_hash",
    "sshs_model_hash",
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.title",
    "modelspec.resolution",
    "modelspec.date",
    "modelspec.hash_sha256",
    "modelspec.license",
    "modelspec.trigger_phrase",
    "modelspec.prediction_type",
    "graft.base_sha256",
    "graft.triggers",
    "graft.class_word",
    "graft.config_digest",
    "graft.dataset_fingerprint",
    "graft.dataset_license",
    "graft.scores",
    "graft.family",
    "graft.merge_semantics",
    "graft.targets",
    "graft.seed",
    "graft.version",
    "graft.privacy",
]


def test_the_header_says_everything(config: Make, photos: Path, tmp_path: Path) -> None:
    wish = config(class_word="circle", dataset={"folder": str(photos), "license": "cc0-1.0"})
    result = train(wish, tmp_path / "toy")
    header = read_header(result.file)
    metadata = header.metadata
    assert [name for name in REQUIRED if not metadata.get(name)] == []
    assert trigger_words(metadata) == ["sks"]
    assert metadata["graft.family"] == "tiny-sd"
    assert metadata["graft.config_digest"] == f"sha256:{wish.digest()}"
    data = hashlib.sha256(result.file.read_bytes()[header.data_offset :]).hexdigest()
    assert metadata["sshs_model_hash"] == data
    assert metadata["modelspec.hash_sha256"] == f"0x{data}"
    assert json.loads(metadata["graft.scores"]) == result.scores
    counts = json.loads(metadata["ss_tag_frequency"])
    assert counts == {
        "dataset": {f"a sks {c} circle": 1 for c in ("red", "blue", "green", "yellow")}
    }
    places = json.dumps([*metadata.values(), (result.folder / "README.md").read_text()])
    assert str(tmp_path.parent) not in places


@pytest.mark.parametrize("privacy", ["full", "tags", "minimal"])
def test_privacy_decides_what_the_header_tells(
    run: Callable[..., Result], photos: Path, privacy: str
) -> None:
    metadata = read_header(run(output={"privacy": privacy}).file).metadata
    tells = {
        "folder": "photos" in metadata["ss_dataset_dirs"],
        "words": "circle" in metadata["ss_tag_frequency"],
    }
    expected = {"full": (True, True), "tags": (False, True), "minimal": (False, False)}[privacy]
    assert (tells["folder"], tells["words"]) == expected


def test_the_card_has_front_matter_a_hub_reads(run: Callable[..., Result]) -> None:
    text = (
        run(title="My toy", output={"license": "mit", "tags": ["test"]}).folder / "README.md"
    ).read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "mit"
    assert front["instance_prompt"] == "sks"
    assert {"lora", "text-to-image", "test", "tiny-sd"} <= set(front["tags"])
    assert front["widget"] == [
        {"text": "sks", "output": {"url": "samples/cover.webp"}},
        {"text": "a sks circle", "output": {"url": "samples/00.png"}},
    ]
    assert "# My toy" in text


def test_samples_carry_what_made_them(run: Callable[..., Result]) -> None:
    with Image.open(run().folder / "samples" / "00.png") as image:
        assert image.text["parameters"].startswith(
            "a sks circle\nSteps: 2, CFG scale: 3.0, Seed: 1"
        )


# What other programs make of it


@pytest.mark.parametrize("targets", ["xattn-kv", "attn", "all+conv"])
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_stock_diffusers_paints_the_samples_again_from_the_folder(
    run: Callable[..., Result], base: Path, dialect: str, targets: str
) -> None:
    result = run(targets=targets, rank=4, alpha=2.0, output={"dialect": dialect})
    pipe = load(base)
    plain = np.asarray(paint(pipe))
    pipe.load_lora_weights(result.folder)
    shown = np.asarray(paint(pipe))
    with_adapter = _pixels(result.folder / "samples" / "00.png")
    np.testing.assert_array_equal(shown, with_adapter)
    assert (shown != plain).any()
    pipe.unet.disable_adapters()
    np.testing.assert_array_equal(np.asarray(paint(pipe)), plain)


def test_peft_paints_the_samples_again_from_the_folder(
    run: Callable[..., Result], base: Path
) -> None:
    result = run(rank=4, alpha=2.0, output={"dialect": "peft"})
    pipe = load(base)
    pipe.unet = PeftModel.from_pretrained(pipe.unet, result.folder)
    np.testing.assert_array_equal(
        np.asarray(paint(pipe)), _pixels(result.folder / "samples" / "00.png")
    )


def _pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)


# What it refuses


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_image(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sd15.encode_images

    def poisoned(examples: Any, *rest: Any) -> torch.Tensor:
        latents = original(examples, *rest)
        latents[[example.name for example in examples].index("2.png")] = torch.nan
        return latents

    monkeypatch.setattr(sd15, "encode_images", poisoned)
    with pytest.raises(NonFiniteLoss) as caught:
        train(config(class_images=None, checkpoint_every=1, steps=8), tmp_path / "toy")
    assert caught.value.images == ("2.png",)
    assert not (tmp_path / "toy").exists()
    lines = (tmp_path / "toy.run" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert (events[-1]["event"], events[-1]["error"]) == ("failed", "NonFiniteLoss")
    # Each finished step was kept, the bad one was not taken.
    saved = [event["step"] for event in events if event["event"] == "checkpoint"]
    assert saved == list(range(1, caught.value.step))
    for path in (tmp_path / "toy.run").glob("checkpoints/*"):
        assert all(torch.isfinite(tensor).all() for tensor in tensors_of(path).values())


def test_a_target_without_gradient_is_named(base: Path) -> None:
    unet = load_base("base", base, torch.device("cpu"), torch.float32).unet
    adapter = inject(unet, "xattn-kv", 2, 2.0)
    for pair in adapter.pairs[1:]:
        pair.up.grad = torch.ones_like(pair.up)
    with pytest.raises(NoGradient) as caught:
        require_gradients(adapter)
    assert caught.value.modules == (adapter.pairs[0].module,)


def test_a_base_that_changed_is_never_published(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sd15._step

    def careless(config: Any, step: int, data: Any, base: Any, *rest: Any) -> float:
        with torch.no_grad():
            base.vae.decoder.conv_in.bias += 1
        return original(config, step, data, base, *rest)

    monkeypatch.setattr(sd15, "_step", careless)
    with pytest.raises(BaseChanged, match="vae of the base changed"):
        train(config(), tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def test_a_failing_sample_does_not_end_the_run(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sd15.make_samples
    calls = []

    def fails_once(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return original(*arguments)

    monkeypatch.setattr(sd15, "make_samples", fails_once)
    seen: list[dict[str, Any]] = []
    samples = {"steps": 2, "prompts": ["x"], "every": 1}
    result = train(config(samples=samples), tmp_path / "toy", listener=seen.append)
    assert result.file.exists()
    failed = [event for event in seen if event["event"] == "sample_failed"]
    assert [(event["step"], event["detail"]) for event in failed] == [(1, "out of memory")]
    kinds = [event["event"] for event in seen]
    assert kinds.index("checkpoint") < kinds.index("sample_failed")


def test_a_full_device_is_one_sentence(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sd15._step

    def full(config: Any, step: int, *rest: Any) -> float:
        if step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(config, step, *rest)

    monkeypatch.setattr(sd15, "_step", full)
    with pytest.raises(OutOfMemory, match="full at step 3; use a smaller batch"):
        train(config(checkpoint_every=1), tmp_path / "toy")
    monkeypatch.setattr(sd15, "_step", original)
    assert train(config(checkpoint_every=1), tmp_path / "toy", resume=True).file.exists()


def test_a_caption_that_is_too_long_is_told(config: Make, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "1.txt").write_text("a sks circle and " * 10)
    seen: list[dict[str, Any]] = []
    wish = config(dataset={"folder": str(tmp_path / "photos")}, steps=1)
    train(wish, tmp_path / "toy", listener=seen.append)
    notes = [event["message"] for event in seen if event["event"] == "note"]
    assert notes == ["1.png: its caption has 42 tokens, the base reads 16"]


@pytest.mark.parametrize("missing", ["model_index.json", "unet", "text_encoder"])
def test_a_base_without_a_part_is_refused(
    base: Path, config: Make, tmp_path: Path, missing: str
) -> None:
    shutil.copytree(base, tmp_path / "broken")
    part = tmp_path / "broken" / missing
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    with pytest.raises(BadBase, match=missing):
        train(config(base=str(tmp_path / "broken")), tmp_path / "toy")


def test_an_existing_output_is_never_touched(config: Make, tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "mine.txt").write_text("precious")
    with pytest.raises(OutputExists, match="already there"):
        train(config(), tmp_path / "toy")
    assert (tmp_path / "toy" / "mine.txt").read_text() == "precious"


# Stopping and going on


def test_a_stopped_run_goes_on_where_it_was(config: Make, tmp_path: Path) -> None:
    whole = tensors_of(train(config(steps=6), tmp_path / "whole").file)
    asked = iter([False, False, True])
    with pytest.raises(Interrupted, match="stopped after step 3"):
        train(config(steps=6), tmp_path / "toy", cancelled=lambda: next(asked))
    with pytest.raises(OutputExists, match="--resume"):
        train(config(steps=6), tmp_path / "toy")
    seen: list[dict[str, Any]] = []
    resumed = train(config(steps=6), tmp_path / "toy", resume=True, listener=seen.append)
    assert [event["step"] for event in seen if event["event"] == "step"] == [4, 5, 6]
    parts = tensors_of(resumed.file)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_only_the_same_run_can_be_continued(config: Make, tmp_path: Path) -> None:
    with pytest.raises(CannotResume, match="no unfinished run"):
        train(config(), tmp_path / "toy", resume=True)
    with pytest.raises(Interrupted):
        train(config(), tmp_path / "toy", cancelled=lambda: True)
    with pytest.raises(CannotResume, match="another config"):
        train(config(learning_rate=1e-5), tmp_path / "toy", resume=True)
