"""Which way of combining a style and a concept leaves both intact?

    python benchmarks/merge_quality.py [--seeds 4] [--images 16] [--dir FOLDER] [--methods NAME …]
        [--no-tuning] [--json FILE] [--grid FILE.png] [--plot FILE.svg]

Trains style and concept adapters of the tiny pipeline (docs/training.md), each with several seeds,
merges every pair by every method, paints with the results and scores the pictures. Prints markdown:
one table of every method as it is, one of what a strength chosen on the pairs of one training seed
does on the pairs of the others. docs/merging.md shows what came out.

Trained adapters and scores stay in --dir, so a run that was stopped goes on where it was; a score
belongs to the bytes of a merge and to the code that paints and scores.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

# Before torch is imported: with one thread a training gives the same adapter again.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SOURCE_DATE_EPOCH", "1767225600")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from diffusers.utils.logging import disable_progress_bar
from quality import figures, painting, scores, study, tables, variants
from quality.painting import Change, Painter
from quality.study import Pair
from quality.variants import Variant

from merge.methods import METHODS
from train.tiny import metrics, render

Results = dict[str, dict[Pair, dict[str, float]]]
"""Variant's name -> pair -> scores."""

GRID_METHODS = 8
TRAINING_S, PICTURE_S = 75, 0.036
"""Of one core of a 2024 server; the estimate that is printed first is made of these."""


def main() -> None:
    options = _options()
    folder: Path = options.dir
    wanted = {"linear", *options.methods}  # linear is what the others are compared with
    plain = [
        variant
        for variant in (*variants.baselines(), *variants.defaults())
        if variant.method["name"] in wanted
    ]
    grids = {} if options.no_tuning else variants.grids()
    grids = {name: grid for name, grid in grids.items() if grid[0].method["name"] in wanted}
    _announce(options.seeds, options.images, len(plain), grids, folder)
    disable_progress_bar()
    begun = time.monotonic()
    for name in study.train_all(folder, options.seeds):
        _say(f"{name} is trained, {time.monotonic() - begun:.0f} s")

    bench = Bench(folder, options.images)
    pairs = study.pairs(options.seeds)
    results: Results = {}
    for number, variant in enumerate(plain, 1):
        results[variant.name] = bench.run(variant, pairs)
        _say(f"{number}/{len(plain)} {variant.name}, {time.monotonic() - begun:.0f} s")
    chosen = {name: _tune(bench, grid, pairs, results) for name, grid in grids.items()}
    seconds = time.monotonic() - begun

    report = tables.report(plain, chosen, results, pairs)
    print(f"{options.seeds} training seeds, {len(pairs)} pairs, {options.images} pictures of each "
          f"kind, {seconds / 60:.0f} minutes\n")  # fmt: skip
    print(report)
    if options.json:
        options.json.write_text(json.dumps(_plain(results), indent=1) + "\n", "utf-8")
    if options.grid:
        figures.grid(_columns(bench, plain, results, pairs), pairs).save(
            options.grid, optimize=True
        )
    if options.plot:
        options.plot.write_text(_plot(plain, results, pairs), "utf-8")


class Bench:
    """Merges, paints and scores; remembers what it has scored before."""

    def __init__(self, folder: Path, images: int) -> None:
        self._painter = Painter()
        self._images = images
        self._folder = folder
        self._cache = folder / f"scores-{_code()[:12]}-{images}.jsonl"
        self._known: dict[str, dict[str, float]] = {}
        if self._cache.exists():
            for line in self._cache.read_text("utf-8").splitlines():
                self._known |= json.loads(line)
        self._bases: dict[tuple[str, str], metrics.Images] = {}

    def run(self, variant: Variant, pairs: Sequence[Pair]) -> dict[Pair, dict[str, float]]:
        return {pair: self._scores(variant, pair) for pair in pairs}

    def paint(self, variant: Variant, pair: Pair, asked: Sequence[scores.Asked]) -> metrics.Images:
        with self._made(variant, pair) as made:
            return self._painter.paint(made.change, asked)

    def paint_base(self, asked: Sequence[scores.Asked]) -> metrics.Images:
        return self._painter.paint(Change(), asked)

    def _scores(self, variant: Variant, pair: Pair) -> dict[str, float]:
        asked = scores.asked_of(pair, self._images)
        with self._made(variant, pair) as made:
            key = f"{pair.name} {made.digest}"
            if key not in self._known:
                images = self._painter.paint(made.change, asked)
                self._known[key] = scores.scores(pair, asked, images, self._base(pair, asked))
                with self._cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({key: self._known[key]}) + "\n")
        return self._known[key]

    def _base(self, pair: Pair, asked: Sequence[scores.Asked]) -> metrics.Images:
        key = (pair.style, pair.concept)
        if key not in self._bases:
            self._bases[key] = self._painter.paint(Change(), asked)
        return self._bases[key]

    @contextmanager
    def _made(self, variant: Variant, pair: Pair) -> Iterator[variants.Made]:
        style, concept = (
            study.adapter_file(self._folder, name, pair.seed) for name in (pair.style, pair.concept)
        )
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            yield variants.make(variant, style, concept, Path(scratch))


def _tune(
    bench: Bench, grid: Sequence[Variant], pairs: Sequence[Pair], results: Results
) -> Variant:
    """The variant with the best overall score on the tuning seed's pairs, scored on all of them."""
    tuning = [pair for pair in pairs if pair.seed == study.TUNING_SEED]

    def overall(variant: Variant) -> float:
        found = bench.run(variant, tuning)
        return math.fsum(found[pair]["overall"] for pair in tuning)

    best = max(grid, key=overall)
    results[best.name] = bench.run(best, pairs)
    _say(f"tuned: {best.name}")
    return best


def _columns(
    bench: Bench, plain: Sequence[Variant], results: Results, pairs: Sequence[Pair]
) -> dict[str, figures.Paint]:
    """Of the picture grid: the inputs, linear merges, and the other methods from the best on."""
    by_name = {variant.name: variant for variant in plain}
    first = [by_name[f"{label}, unmerged"] for label in ("style alone", "concept alone")]
    first += [by_name[f"{label}, whole"] for label in ("linear", "linear 0.7 / 0.7")]
    others = [v for v in _merged(plain) if v.label in METHODS and v not in first]
    others = tables.by_score(others, results, pairs)[:GRID_METHODS]

    def paint(variant: Variant) -> figures.Paint:
        return lambda pair, asked: bench.paint(variant, pair, asked)

    columns = {variant.label.replace(" ", "\n", 1): paint(variant) for variant in first + others}
    return {"base": lambda pair, asked: bench.paint_base(asked), **columns}


def _plot(plain: Sequence[Variant], results: Results, pairs: Sequence[Pair]) -> str:
    shown = tables.by_score(_merged(plain), results, pairs)
    rows = {
        variant.label: {
            score: tables.column(results, variant.name, score, pairs)
            for score in ("overall", *scores.OVERALL)
        }
        for variant in shown
    }
    return figures.plot(rows, tables.REFERENCE.label)


def _merged(plain: Sequence[Variant]) -> list[Variant]:
    """Each way to merge once, at the size of both inputs."""
    return [v for v in plain if v.size in tables.BOTH_INPUTS and v.size != "unmerged"]


def _code() -> str:
    """A digest of everything that decides a score but the merge itself."""
    files = [painting.__file__, scores.__file__, metrics.__file__, render.__file__]
    return sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def _announce(
    seeds: int, images: int, n_plain: int, grids: Mapping[str, Sequence[Variant]], folder: Path
) -> None:
    adapters = [
        study.adapter_file(folder, name, seed)
        for seed in range(seeds)
        for name in (*study.STYLES, *study.CONCEPTS)
    ]
    missing = sum(not file.exists() for file in adapters)
    tried = sum(map(len, grids.values())) * len(study.STYLES)
    cells = (n_plain + len(grids)) * len(study.STYLES) * seeds + tried
    pictures = cells * images * len(scores.KINDS)
    minutes = (missing * TRAINING_S + pictures * PICTURE_S) / 60
    _say(f"{missing} adapters to train, at most {pictures} pictures to paint: "
         f"at most {minutes:.0f} minutes of one core")  # fmt: skip


def _plain(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {pair.name: found for pair, found in by_pair.items()}
        for name, by_pair in results.items()
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=4, choices=range(2, 8))
    parser.add_argument("--images", type=int, default=16, help="of each of the four kinds")
    parser.add_argument("--dir", type=Path, default=study.cache_folder(), metavar="FOLDER")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--no-tuning", action="store_true", help="only methods as they are")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--grid", type=Path, metavar="FILE.png")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    return parser.parse_args()


if __name__ == "__main__":
    main()
