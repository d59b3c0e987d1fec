"""The committed weights of the tiny pipeline, and the script that makes them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from transformers import CLIPTextModel

from train.tiny import PIPELINE_DIR, metrics, pretrain, render
from train.tiny.generate import generate
from train.tiny.load import digests, load_pipeline, read_sums, write_sums
from train.tiny.tokenizer import WORDS, write_tokenizer


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return load_pipeline()


def test_the_committed_files_are_the_ones_that_were_measured() -> None:
    assert digests(PIPELINE_DIR) == read_sums(PIPELINE_DIR)


def test_a_changed_file_has_another_digest(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(PIPELINE_DIR, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    was, now = read_sums(folder), digests(folder)
    assert [name for name in was if was[name] != now[name]] == [
        "unet/diffusion_pytorch_model.safetensors"
    ]
    write_sums(folder)
    assert read_sums(folder) == now


def test_the_pipeline_is_small_and_float16() -> None:
    files = [path for path in PIPELINE_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10 * 10**6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {path.parent.name for path in weights} == {"unet", "vae", "text_encoder"}
    for path in weights:
        with safe_open(path, "pt") as tensors:
            dtypes = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        assert dtypes == {"F16"}


def test_stock_diffusers_loads_it_and_paints() -> None:
    stock = StableDiffusionPipeline.from_pretrained(PIPELINE_DIR)
    stock.set_progress_bar_config(disable=True)
    assert isinstance(stock.text_encoder, CLIPTextModel)
    picture = stock("a red circle on white background", num_inference_steps=2).images[0]
    assert picture.size == (render.SIZE, render.SIZE)


def test_it_loads_in_the_dtype_that_was_asked_for(pipe: StableDiffusionPipeline) -> None:
    half = load_pipeline(dtype=torch.float16)
    for name in ("unet", "vae", "text_encoder"):
        wanted = getattr(half, name).state_dict()
        for key, tensor in getattr(pipe, name).state_dict().items():
            if tensor.is_floating_point():
                assert wanted[key].dtype == torch.float16
                assert torch.equal(tensor, wanted[key].float())


def test_the_committed_tokenizer_is_the_one_the_code_makes(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    tokenizer = pipe.tokenizer
    assert tokenizer.get_vocab() == write_tokenizer(tmp_path).get_vocab()
    assert all(len(tokenizer.tokenize(word)) == 1 for word in WORDS)
    config = pipe.text_encoder.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def test_an_image_depends_on_prompt_seed_and_place_alone(pipe: StableDiffusionPipeline) -> None:
    red, blue = "a red circle on white background", "a blue square on gray background"
    two = generate(pipe, [red, blue], seed=3, steps=4)
    assert np.array_equal(two, generate(pipe, [red, blue], seed=3, steps=4))
    three = generate(pipe, [blue, blue, red], seed=3, steps=4)
    assert np.abs(two[1].astype(int) - three[1].astype(int)).max() <= 1
    assert not np.array_equal(three[0], three[1])
    for other in ({"seed": 4}, {"steps": 5}, {"guidance": 1.5}):
        assert not np.array_equal(
            two, generate(pipe, [red, blue], **{"seed": 3, "steps": 4} | other)
        )


def test_it_paints_what_the_prompt_says(pipe: StableDiffusionPipeline) -> None:
    scenes = list(render.known_scenes())[::2]
    images = generate(pipe, [render.caption(scene) for scene in scenes], seed=11)
    scores = metrics.content_accuracy(images, scenes)
    assert scores["colour"] >= 0.98
    assert scores["background"] >= 0.98
    assert scores["shape"] >= 0.9


def test_it_knows_its_nouns(pipe: StableDiffusionPipeline) -> None:
    pairs = [
        (noun.scene(background), word)
        for word, noun in render.KNOWN_NOUNS.items()
        for background in render.BACKGROUNDS
    ]
    images = generate(pipe, [render.caption(scene, word) for scene, word in pairs], seed=11)
    assert metrics.content_accuracy(images, [scene for scene, _ in pairs])["all"] >= 0.85


def test_the_vae_is_a_neutral_codec(pipe: StableDiffusionPipeline) -> None:
    """New styles and concepts survive it, so an adapter can teach them to the UNet."""
    for style in render.NEW_STYLES:
        coded = _through_vae(pipe, render.render_all(list(render.known_scenes(style)), 7))
        assert metrics.style_scores(coded, style).mean() >= 0.9, style
    for name, concept in render.CONCEPTS.items():
        scenes = [concept.scene(background) for background in render.BACKGROUNDS] * 16
        coded = _through_vae(pipe, render.render_all(scenes, 7))
        assert (metrics.concept_scores(coded, name) > metrics.PRESENT).mean() >= 0.99, name


def _through_vae(pipe: StableDiffusionPipeline, images: metrics.Images) -> metrics.Images:
    latents = pretrain.encode(pipe.vae, pretrain.to_tensor(images))
    with torch.no_grad():
        decoded = pipe.vae.decode(latents).sample
    pixels = (decoded.clamp(-1, 1) + 1) * 127.5
    return pixels.round().permute(0, 2, 3, 1).numpy().astype(np.uint8)


@pytest.mark.slow
def test_the_gates_hold_over_all_known_scenes(pipe: StableDiffusionPipeline) -> None:
    pretrain.check_gates(pipe)


@pytest.fixture
def short_pretraining(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "N_IMAGES", 32)
    monkeypatch.setattr(pretrain, "GATE_SEEDS", (1,))


@pytest.mark.usefixtures("short_pretraining")
def test_pretraining_runs_and_a_pipeline_below_the_gates_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(pretrain.GateMissed, match=r"shape 0\.\d+ \(gate 0\.9\)") as missed:
        pretrain.pretrain(tmp_path / "pipeline", vae_steps=2, unet_steps=2)
    assert missed.value.scores["shape"] < 0.9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("short_pretraining")
def test_pretraining_writes_what_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "GATES", dict.fromkeys(pretrain.GATES, 0.0))
    out = tmp_path / "pipeline"
    pretrain.pretrain(out, vae_steps=2, unet_steps=2)
    assert digests(out) == read_sums(out)
    assert set(read_sums(out)) == set(read_sums(PIPELINE_DIR))
    assert json.loads((out / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    again = tmp_path / "again"
    pretrain.pretrain(again, vae_steps=2, unet_steps=2)
    assert read_sums(again) == read_sums(out)
    with pytest.raises(FileExistsError, match="pipeline is already there"):
        pretrain.pretrain(out, vae_steps=2, unet_steps=2)
