"""The benchmark's scores on pictures that its own renderer drew: it says what it shall say."""

import numpy as np
import pytest

from benchmarks.quality import statistics, study, tables, variants
from benchmarks.quality.scores import KINDS, OVERALL, asked_of, scores
from benchmarks.quality.study import Pair
from benchmarks.quality.variants import Variant
from merge.methods import METHODS
from train.tiny import metrics, render

N = 8
PAIRS = study.pairs(1)


def drawn(pair: Pair, style: str | None = None, concept: str | None = None) -> metrics.Images:
    """What is asked for, or with another style or the base's own shape in place of the concept."""
    scenes = []
    for asked in asked_of(pair, N):
        scene = asked.scene
        if style is not None:
            scene = render.Scene(scene.shape, scene.colour, scene.background, style)
        if concept is not None and asked.kind in ("concept", "both"):
            scene = render.Scene("circle", "red", scene.background, scene.style)
        scenes.append(scene)
    return render.render_all(scenes, seed=3)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_perfect_merge_scores_one(pair: Pair) -> None:
    images = drawn(pair)
    found = scores(pair, asked_of(pair, N), images, images)
    assert {name: found[name] for name in (*OVERALL, "content", "overall")} == pytest.approx(
        dict.fromkeys((*OVERALL, "content", "overall"), 1), abs=0.06
    )
    assert abs(found["leak"]) < 0.01


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_noise_scores_nothing(pair: Pair) -> None:
    asked = asked_of(pair, N)
    noise = np.random.default_rng(0).integers(0, 256, (len(asked), 64, 64, 3), dtype=np.uint8)
    found = scores(pair, asked, noise, drawn(pair))
    assert max(found[name] for name in OVERALL) < 0.1
    assert found["content"] <= 0.25, "guessing one of the four known shapes"


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_merge_that_lost_an_input_says_which(pair: Pair) -> None:
    asked, perfect = asked_of(pair, N), drawn(pair)
    without_style = scores(pair, asked, drawn(pair, style="plain"), perfect)
    without_concept = scores(pair, asked, drawn(pair, concept="none"), perfect)
    assert without_style["style"] < 0.05
    assert without_style["both"] < 0.05
    assert without_style["concept"] > 0.95
    assert without_concept["concept"] < 0.05
    assert without_concept["both"] < 0.05
    assert without_concept["style"] > 0.95


def test_a_style_that_is_everywhere_is_a_leak() -> None:
    pair = PAIRS[0]
    perfect = drawn(pair)
    found = scores(pair, asked_of(pair, N), drawn(pair, style=pair.style), perfect)
    assert found["leak"] > 0.9
    assert found["style"] > 0.95


def test_every_kind_is_asked_for_equally_often_and_in_words_of_its_own() -> None:
    asked = asked_of(Pair("stripes", "ring", 0), N)
    assert [one.kind for one in asked] == [kind for kind in KINDS for _ in range(N)]
    has_words = {
        kind: {
            ("glim style" in one.prompt, "zorb" in one.prompt) for one in asked if one.kind == kind
        }
        for kind in KINDS
    }
    assert has_words == {
        "style": {(True, False)},
        "concept": {(False, True)},
        "both": {(True, True)},
        "old": {(False, False)},
    }


def test_no_two_pairs_share_an_adapter_and_every_style_meets_every_concept() -> None:
    pairs = study.pairs(3)
    assert len({(pair.style, pair.seed) for pair in pairs}) == len(pairs)
    assert len({(pair.concept, pair.seed) for pair in pairs}) == len(pairs)
    assert {(pair.style, pair.concept) for pair in pairs} == {
        (style, concept) for style in study.STYLES for concept in study.CONCEPTS
    }


def test_every_method_has_a_row_of_its_own_and_a_grid() -> None:
    named = {variant.method["name"] for variant in (*variants.baselines(), *variants.defaults())}
    assert named == set(METHODS)
    assert set(METHODS) <= set(variants.grids())


def test_an_interval_is_students_t() -> None:
    """Nine values: t(8) = 2.306; their deviation from 5 is sqrt(60 / 8)."""
    found = statistics.estimate([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert found.mean == 5
    assert found.half == pytest.approx(2.306 * (60 / 8) ** 0.5 / 3)
    same = statistics.difference([2, 4, 6], [1, 3, 5])
    assert (same.mean, same.half) == (1, 0)


def test_the_table_puts_the_best_merge_first_and_marks_what_is_apart() -> None:
    pairs = study.pairs(3)
    rows = [tables.REFERENCE, Variant("better"), Variant("style alone", "unmerged")]
    rows.append(Variant("better", "rank 8"))
    results = {
        row.name: {
            pair: dict.fromkeys(tables.COLUMNS, level + 0.01 * (index % 2))
            for index, pair in enumerate(pairs)
        }
        for row, level in zip(rows, (0.5, 0.8, 0.3, 0.7), strict=True)
    }
    lines = tables.report(rows, {}, results, pairs).splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| style alone", "| better", "| linear"]
    assert lines[5].endswith("| 0.80 ± 0.00 | **+0.30 ± 0.00** | 0.70 ± 0.00 |  |")
