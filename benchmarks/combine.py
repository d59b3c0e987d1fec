"""How long does it take to combine adapters at a rank, and how near is it to the exact result?

    python benchmarks/combine.py [--small | --flux] [--adapters 2,4,8] [--rank 16] [--ties]
                                 [--peers "peft svd,kohya svd"] [--largest 3000000]
                                 [--dir FOLDER] [--repeat 3] [--no-peers]

Makes adapters of random numbers for SDXL's attention and feed-forward layers (722 modules; --small:
SD 1.5's 192; --flux: FLUX.1's 494), of ranks 16 and 32 in turns, and combines them, files to file:
at a rank, exactly, and by TIES with --ties. Peers form the dense change of a layer and decompose
it. Each is run on one layer of each shape, and its time multiplied by how many layers have that
shape, because all of them would take minutes; layers with more elements than --largest are not run
but extrapolated by out * in * min(out, in) from the largest that was, and where all have more the
smallest is run. Their memory is that of one such layer, ours that of the whole merge.

Errors are those of the sampled layer that is worst, in float64: from the sum itself, which no
adapter of the asked rank can come nearer to than the share that is printed first, and from the
nearest adapter of that rank.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bake import Model, adapter_keys, make_adapter
from combine_peers import PEERS
from numpy.typing import NDArray
from safetensors.numpy import load_file

from merge.families import FAMILIES
from merge.formats.hashes import sha256_file

ROOT = Path(__file__).resolve().parents[1]
STRENGTHS = (0.7, 0.5, -0.4, 0.9, 0.6, 0.3, 0.8, 0.5)
RANKS = (16, 32)
DENSITY = 0.2

ENGINE = """
import json, sys, time
from pathlib import Path
import torch
torch.linalg.svd(torch.randn(4, 4))  # loads the library that does it
sys.path.insert(0, "benchmarks")
from combine_peers import private_peak
from merge.execute import execute
from merge.plan import plan
from merge.recipe import Recipe
recipe, out = Recipe.load(Path(sys.argv[1])), Path(sys.argv[2])
with private_peak() as peak:
    started, cpu = time.perf_counter(), time.process_time()
    outcome = execute(plan(recipe, {ref: Path(ref) for ref in recipe.refs()}), out)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu": cpu, "memory": peak[0]}))
"""

Array = NDArray[np.float64]
Product = tuple[Array, Array]  # up (out, rank) and down (rank, in): a change in factors


@dataclass(frozen=True)
class Sample:
    """One layer of each shape: its keys in the files, and how many layers are like it."""

    shape: tuple[int, int]
    keys: tuple[str, str, str]
    count: int

    @property
    def work(self) -> int:
        return self.shape[0] * self.shape[1] * min(self.shape)


def main() -> None:
    options = _options()
    family = "flux1" if options.flux else "sd15" if options.small else "sdxl"
    model = Model(FAMILIES[family], "BF16" if options.flux else "F16")
    samples = _samples(model)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="combine-") as name:
        folder = Path(name)
        for n in options.adapters:
            ranks = [RANKS[index % 2] for index in range(n)]
            paths = [
                make_adapter(folder, model, rank=rank, seed=seed) for seed, rank in enumerate(ranks)
            ]
            layers = sum(sample.count for sample in samples)
            print(f"\n{family}, {layers} modules, {n} adapters of ranks {', '.join(map(str, ranks))}"
                  f" -> {options.rank}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")  # fmt: skip
            _compare(folder, paths, samples, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--small", action="store_true", help="SD 1.5's modules instead of SDXL's")
    parser.add_argument("--flux", action="store_true", help="FLUX.1's modules instead of SDXL's")
    parser.add_argument(
        "--adapters", type=_numbers, default=[2], help="how many, for example 2,4,8"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--ties", action="store_true", help="TIES too, ours and peft's: minutes")
    parser.add_argument("--peers", type=_names, default=list(PEERS))
    parser.add_argument("--no-peers", action="store_const", dest="peers", const=[])
    parser.add_argument("--largest", type=int, default=3_000_000)
    parser.add_argument("--dir", type=Path, default=None, help="where to make the files")
    parser.add_argument("--repeat", type=int, default=3)
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= PEERS.keys():
        raise argparse.ArgumentTypeError(f"one or more of: {', '.join(PEERS)}")
    return names


def _samples(model: Model) -> list[Sample]:
    counts: Counter[tuple[int, int]] = Counter()
    paths = {}
    for path, module in model.adapted(few=False).items():
        shape = (module.out_features, module.in_features)
        counts[shape] += 1
        paths[shape] = path
    keys = {shape: adapter_keys(model.family, path) for shape, path in paths.items()}
    return [Sample(shape, keys[shape], counts[shape]) for shape in sorted(counts, key=np.prod)]


def _compare(
    folder: Path, paths: Sequence[Path], samples: Sequence[Sample], options: argparse.Namespace
) -> None:
    strengths = STRENGTHS[: len(paths)]
    files = [_load(path) for path in paths]
    sums = [_sum(files, sample.keys, strengths) for sample in samples]
    nearest = [_nearest(its, options.rank) for its in sums]
    print(f"  the sum is {_worst(nearest, sums):.3f} of its norm away from any of that rank")
    print(f"  {'':<26}{'seconds':>9}{'core-s':>8}{'MiB':>7}{'from sum':>10}{'from best':>10}")
    ties = {"method": {"name": "ties", "density": DENSITY}}
    rows: dict[str, tuple[dict[str, Any], Sequence[Sequence[Product]]]] = {
        "linear": ({"rank": {"fixed": options.rank}}, (sums, nearest)),
        "linear, exact": ({"rank": {"exact": True}}, (sums,)),
    }
    if options.ties:
        rows["ties"] = ({"rank": {"fixed": options.rank}} | ties, ())
    ours = {}
    for title, (chosen, wanted) in rows.items():
        found = _engine(folder, paths, strengths, chosen, options.repeat)
        ours[title] = found["seconds"]
        made = _load(folder / "out.safetensors")
        results = [_product(made, sample.keys) for sample in samples]
        core_seconds = f"{found['cpu']:.2f}"
        _print(title, found, core_seconds, [_worst(results, its) for its in wanted])
    run = [its for its in samples if np.prod(its.shape) <= options.largest] or list(samples[:1])
    for peer in options.peers:
        if peer.startswith("mergekit") and importlib.util.find_spec("mergekit") is None:
            print(f"  {peer:<26} is not installed")
        elif "ties" not in peer or options.ties:
            found = _peer(peer, folder, paths, run, strengths, options.rank)
            found["seconds"] = _scaled(found["seconds"], run, samples)
            wanted = () if "ties" in peer else (sums,) if "cat" in peer else (sums, nearest)
            away = [_worst(found["results"], its[: len(run)]) for its in wanted]
            like = "ties" if "ties" in peer else "linear, exact" if "cat" in peer else "linear"
            _print(peer, found, "", away, f"  {found['seconds'] / ours[like]:.1f} x ours")


def _print(
    title: str, found: dict[str, Any], core_seconds: str, away: Sequence[float], note: str = ""
) -> None:
    figures = f"{found['seconds']:>9.2f}{core_seconds:>8}{found['memory']:>7.0f}"
    print(f"  {title:<26}{figures}{''.join(f'{its:>10.1e}' for its in away)}{note}", flush=True)


def _engine(
    folder: Path,
    paths: Sequence[Path],
    strengths: Sequence[float],
    chosen: dict[str, Any],
    repeat: int,
) -> dict[str, Any]:
    inputs = [
        {"ref": str(path), "sha256": sha256_file(path), "strength": strength}
        for path, strength in zip(paths, strengths, strict=True)
    ]
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps({"kind": "merge", "inputs": inputs, **chosen}), "utf-8")
    command = [sys.executable, "-c", ENGINE, str(recipe), str(folder / "out.safetensors")]
    found = []
    for _ in range(repeat):
        done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE)
        found.append(json.loads(done.stdout))
    return {key: min(its[key] for its in found) for key in found[0]}


def _peer(
    peer: str,
    folder: Path,
    paths: Sequence[Path],
    run: Sequence[Sample],
    strengths: Sequence[float],
    rank: int,
) -> dict[str, Any]:
    out = folder / "peer.safetensors"
    job = {
        "peer": peer,
        "paths": [str(path) for path in paths],
        "layers": [sample.keys for sample in run],
        "strengths": strengths,
        "rank": rank,
        "density": DENSITY,
        "out": str(out),
    }
    command = [sys.executable, str(ROOT / "benchmarks/combine_peers.py"), json.dumps(job)]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    tensors = load_file(out)
    found["results"] = [
        (tensors[f"{i}.up"].astype(np.float64), tensors[f"{i}.down"].astype(np.float64))
        for i in range(len(run))
    ]
    return found


def _scaled(seconds: Sequence[float], run: Sequence[Sample], samples: Sequence[Sample]) -> float:
    known = dict(zip([sample.shape for sample in run], seconds, strict=True))
    largest = max(run, key=lambda sample: sample.work)
    per_work = known[largest.shape] / largest.work
    return sum(sample.count * known.get(sample.shape, sample.work * per_work) for sample in samples)


def _load(path: Path) -> dict[str, Any]:
    """Tensors as float32; numpy has no bfloat16."""
    from safetensors.torch import load_file as load_torch

    return {key: tensor.float().numpy() for key, tensor in load_torch(path).items()}


def _product(tensors: dict[str, Any], keys: tuple[str, str, str]) -> Product:
    down, up = (tensors[key].reshape(len(tensors[key]), -1).astype(np.float64) for key in keys[:2])
    alpha = float(tensors[keys[2]]) if keys[2] else down.shape[0]
    return up * (alpha / down.shape[0]), down


def _sum(
    files: Sequence[dict[str, Any]], keys: tuple[str, str, str], strengths: Sequence[float]
) -> Product:
    products = [_product(tensors, keys) for tensors in files]
    ups = [strength * up for (up, _), strength in zip(products, strengths, strict=True)]
    return np.hstack(ups), np.vstack([down for _, down in products])


def _nearest(product: Product, rank: int) -> Product:
    """Eckart & Young's, by QR of both factors and the SVD of what is between them."""
    (q_up, r_up), (q_down, r_down) = np.linalg.qr(product[0]), np.linalg.qr(product[1].T)
    u, values, vh = np.linalg.svd(r_up @ r_down.T)
    return q_up @ (u[:, :rank] * values[:rank]), vh[:rank] @ q_down.T


def _worst(found: Sequence[Product], wanted: Sequence[Product]) -> float:
    return max(_away(*pair) for pair in zip(found, wanted, strict=True))


def _away(found: Product, wanted: Product) -> float:
    """The difference's norm, relative to what is wanted."""
    difference = np.hstack([found[0], -wanted[0]]), np.vstack([found[1], wanted[1]])
    return _norm(difference) / _norm(wanted)


def _norm(product: Product) -> float:
    r_up, r_down = np.linalg.qr(product[0]).R, np.linalg.qr(product[1].T).R
    return float(np.linalg.norm(r_up @ r_down.T))


if __name__ == "__main__":
    main()
