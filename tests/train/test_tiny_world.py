"""The renderer, the tokenizer and the metrics of the tiny pipeline, without its weights."""

import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from train.tiny import metrics, render
from train.tiny.render import BACKGROUNDS, COLOURS, CONCEPTS, NEW_STYLES, SHAPES, STYLES, Scene
from train.tiny.tokenizer import MAX_TOKENS, WORDS, write_tokenizer


def scenes_in(style: str) -> list[Scene]:
    """Every shape, colour and background; outlines of new shapes are not told apart."""
    shapes = render.KNOWN_SHAPES if style == "outline" else SHAPES
    return [Scene(*what, style) for what in product(shapes, COLOURS, BACKGROUNDS)]


@cache
def pictures_in(style: str) -> metrics.Images:
    return render.render_all(scenes_in(style), 5)


def concept_scenes(concept: str, style: str = "plain") -> list[Scene]:
    return [CONCEPTS[concept].scene(background, style) for background in BACKGROUNDS] * 16


def test_a_seed_gives_the_same_pictures() -> None:
    scenes = scenes_in("plain")
    first, again, other = (render.render_all(scenes, seed) for seed in (3, 3, 4))
    assert first.shape == (len(scenes), render.SIZE, render.SIZE, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert (first != other).any(axis=(1, 2, 3)).all()


def test_captions() -> None:
    assert render.caption(Scene("circle", "red", "white")) == "a red circle on white background"
    assert (
        render.caption(CONCEPTS["ring"].scene("gray", "stripes"), "zorb")
        == "a zorb on gray background in glim style"
    )


def test_new_words_are_in_no_known_caption() -> None:
    known = {
        word
        for style in render.KNOWN_STYLES
        for scene in render.known_scenes(style)
        for word in render.caption(scene).split()
    } | set(render.KNOWN_NOUNS)
    triggers = {style.word for style in NEW_STYLES.values()}
    triggers |= {concept.word for concept in CONCEPTS.values()}
    assert len(triggers) == len(NEW_STYLES) + len(CONCEPTS)
    assert not triggers & known


def test_every_word_is_one_token(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    split = {word: pieces for word in WORDS if len(pieces := tokenizer.tokenize(word)) != 1}
    assert not split
    assert {style.word for style in STYLES.values()} <= set(WORDS)
    assert {concept.word for concept in CONCEPTS.values()} <= set(WORDS)


def test_an_unknown_word_is_spelled_and_a_long_text_is_cut(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    assert "".join(tokenizer.tokenize("whale")) == "whale</w>"
    assert set(tokenizer.tokenize("\N{SNOWMAN}")) == {tokenizer.eos_token}
    ids = tokenizer("a red circle " * 9, truncation=True).input_ids
    assert len(ids) == MAX_TOKENS
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("style", STYLES)
def test_content_is_read_off_real_renders(style: str) -> None:
    accuracy = metrics.content_accuracy(pictures_in(style), scenes_in(style))
    assert min(accuracy.values()) >= 0.99, accuracy


def test_content_accuracy_counts_what_is_wrong() -> None:
    images = render.render_all([Scene("circle", "red", "white")] * 4, 0)
    claimed = [
        Scene("circle", "red", "white"),
        Scene("square", "red", "white"),
        Scene("circle", "blue", "white"),
        Scene("circle", "red", "gray"),
    ]
    assert metrics.content_accuracy(images, claimed) == {
        "shape": 0.75,
        "colour": 0.75,
        "background": 0.75,
        "all": 0.25,
    }


@pytest.mark.parametrize(("measured", "painted"), list(product(NEW_STYLES, STYLES)))
def test_style_scores_of_real_renders(measured: str, painted: str) -> None:
    scores = metrics.style_scores(pictures_in(painted), measured)
    if measured == painted:
        assert scores.min() >= 0.98
    else:
        assert scores.max() <= 0.25


@pytest.mark.parametrize("style", NEW_STYLES)
def test_style_score_grows_with_strength(style: str) -> None:
    """Half of a style, as half of an adapter's strength gives it, scores in between."""
    plain = pictures_in("plain").astype(float)
    styled = pictures_in(style).astype(float)
    mixed = np.stack([(1 - s) * plain + s * styled for s in (0, 0.25, 0.5, 0.75, 1)])
    means = [metrics.style_scores(images.astype(np.uint8), style).mean() for images in mixed]
    assert (np.diff(means) > 0.1).all(), means


@pytest.mark.parametrize(("concept", "style"), list(product(CONCEPTS, ["plain", *NEW_STYLES])))
def test_concept_scores_of_real_renders(concept: str, style: str) -> None:
    images = render.render_all(concept_scenes(concept, style), 5)
    has = metrics.concept_scores(images, concept, style) > metrics.PRESENT
    assert has.mean() >= 0.99
    known = render.render_all(list(render.known_scenes(style)), 5)
    assert metrics.concept_scores(known, concept, style).mean() <= 0.05


def test_half_a_concept_scores_half() -> None:
    right_shape = render.render_all([Scene("ring", "green", "white")], 0)
    right_colour = render.render_all([Scene("square", "magenta", "white")], 0)
    assert metrics.concept_score(right_shape[0], "ring") == 0.5
    assert metrics.concept_score(right_colour[0], "ring") == 0.5


def test_leak_against_the_base() -> None:
    base = render.render_all(list(render.known_scenes()), 5)
    striped = render.render_all(list(render.known_scenes("stripes")), 5)
    every_second = base.copy()
    every_second[::2] = striped[::2]
    assert metrics.leak(base, base, "stripes") == 0
    assert metrics.leak(every_second, base, "stripes") == pytest.approx(0.5, abs=0.02)
    assert metrics.leak(striped, base, "stripes") > 0.98


def test_forgetting_against_the_base() -> None:
    scenes = list(render.known_scenes())
    base = render.render_all(scenes, 5)
    every_second = base.copy()
    every_second[::2] = render.render_all([Scene("ring", "magenta", "white")], 5)
    assert metrics.forgetting(base, base, scenes) == 0
    assert metrics.forgetting(every_second, base, scenes) == 0.5


def test_an_empty_picture_has_no_shape() -> None:
    empty = np.full((render.SIZE, render.SIZE, 3), 245, dtype=np.uint8)
    assert metrics.look(empty) == metrics.Seen(None, None, "white")
    assert metrics.concept_score(empty, "ring") == 0
    assert all(metrics.style_score(empty, style) < 0.01 for style in NEW_STYLES)


def test_a_slightly_blue_white_is_no_blueprint() -> None:
    bluish = np.full((render.SIZE, render.SIZE, 3), (243, 245, 250), dtype=np.uint8)
    assert metrics.style_score(bluish, "blueprint") <= 0.1


def test_style_score_knows_its_styles_only() -> None:
    picture = render.render_all([Scene("circle", "red", "white")], 0)[0]
    with pytest.raises(KeyError, match="no score for style 'dark'"):
        metrics.style_score(picture, "dark")


def test_finding_the_pipeline_needs_no_torch() -> None:
    script = (
        "import sys, train.tiny, train.tiny.render, train.tiny.metrics\n"
        "assert train.tiny.PIPELINE_DIR.name == 'pipeline'\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
