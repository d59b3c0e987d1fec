"""How long does it take to bake an adapter into a checkpoint, next to copying it and to diffusers?

    python benchmarks/bake.py [--small] [--dir FOLDER] [--repeat 3] [--no-diffusers]

Makes an SDXL-size UNet of random fp16 weights (5.1 GB; --small: SD 1.5's 1.7 GB) and a rank-16
adapter of its attention and feed-forward layers, both removed at the end; needs three times the
base in free disk space and, for diffusers, twice in memory. The base is in the page cache and every
output is synced to disk. Each figure is the best of the repetitions, taken in turns.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from merge.families import FAMILIES
from merge.families.layers import OWN
from merge.formats.hashes import sha256_file
from merge.formats.writer import FileWriter, write_file

RANK = 16
ROOT = Path(__file__).resolve().parents[1]

ENGINE = """
import json, os, sys, threading, time
from pathlib import Path
started = time.perf_counter()
import torch
def private():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
torch_alone = private()
from merge.execute import execute
from merge.plan import plan
from merge.recipe import Recipe
imported = time.perf_counter()
peak, stop = [0.0], threading.Event()
def watch():
    while not stop.wait(0.005):
        peak[0] = max(peak[0], private())
watcher = threading.Thread(target=watch); watcher.start()
cpu_before = time.process_time()
recipe, out, digest = Recipe.load(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3] == "digest"
outcome = execute(plan(recipe, {ref: Path(ref) for ref in recipe.refs()}), out, digest=digest)
ended = time.perf_counter()
cpu = time.process_time() - cpu_before
stop.set(); watcher.join()
print(json.dumps({"engine": ended - imported, "imports": imported - started, "cpu": cpu,
                  "memory": peak[0] - torch_alone, "sha256": outcome.sha256,
                  "unchanged": outcome.certificate["unchanged"]}))
"""

DIFFUSERS = """
import os, sys, time
from pathlib import Path
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
mixin = {"sdxl": StableDiffusionXLLoraLoaderMixin, "sd15": StableDiffusionLoraLoaderMixin}[sys.argv[4]]
started = time.perf_counter()
unet = UNet2DConditionModel.from_pretrained(sys.argv[1], torch_dtype=torch.float16)
loaded = mixin.lora_state_dict(sys.argv[2], unet_config=unet.config)
mixin.load_lora_into_unet(loaded[0], loaded[1], unet=unet)
unet.fuse_lora(lora_scale=0.8)
unet.unload_lora()
unet.save_pretrained(sys.argv[3], max_shard_size="100GB")
for file in Path(sys.argv[3]).iterdir():
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
print(time.perf_counter() - started)
"""


def main() -> None:
    options = _options()
    family = "sd15" if options.small else "sdxl"
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="bake-") as name:
        folder = Path(name)
        base, adapter = make_base(folder / "unet", family), make_adapter(folder, family)
        size = base.stat().st_size
        recipe = make_recipe(folder, base, adapter)
        out = folder / "out.safetensors"
        runs: dict[str, list[dict[str, Any]]] = {"cp": [], "bake": [], "digest": []}
        for _ in range(options.repeat):
            runs["cp"].append(_timed(lambda: _copy(base, out)))
            _remove(out)
            for mode in ("bake", "digest"):
                runs[mode].append(_timed(lambda mode=mode: _bake(recipe, out, mode)))  # type: ignore[misc]
                _remove(out)
        peer = None
        if not options.no_diffusers:
            peer = _diffusers(base.parent, adapter, folder / "peer", family)
            assert peer > 0
        _print(family, size, runs, peer)


def make_base(folder: Path, family: str) -> Path:
    """A UNet of the family in diffusers' layout with weights of a plausible size, and its config."""
    folder.mkdir()
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for path, module in FAMILIES[family].components["unet"].items():
        tensors.append((f"{path}.weight", "F16", module.shape))
        if module.has_bias:
            tensors.append((f"{path}.bias", "F16", module.shape[:1]))
    noise = np.random.default_rng(0).standard_normal(2**24).astype(np.float32)
    block = (noise * 0.03).astype(np.float16).tobytes()
    path = folder / "diffusion_pytorch_model.safetensors"
    with FileWriter(path, tensors, {"format": "pt"}) as writer:
        for index, (key, info) in enumerate(writer.layout.tensors.items()):
            # Another place of the noise for every tensor, so that no two are alike.
            shift = 2 * (index * 7919 % 2**20)
            for start in range(0, info.size_bytes, len(block) - 2**21):
                piece = min(len(block) - 2**21, info.size_bytes - start)
                writer.write(key, block[shift : shift + piece], start)
    (folder / "config.json").write_text(json.dumps(unet_config(family)), "utf-8")
    return path


def unet_config(family: str) -> dict[str, Any]:
    config: dict[str, Any] = {"_class_name": "UNet2DConditionModel", "sample_size": 64}
    if family == "sd15":
        return config | {"cross_attention_dim": 768, "attention_head_dim": 8}
    return config | {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    }


def make_adapter(folder: Path, family: str, *, rank: int = RANK, seed: int = 1) -> Path:
    """A kohya adapter of every attention and feed-forward layer: 722 modules for SDXL, 192 for SD 1.5."""
    known = FAMILIES[family]
    naming = known.kohya_naming.get("unet", OWN)
    names = {layer.module: path for path, layer in known.layers["unet"][naming].items()}
    random = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for path, module in known.components["unet"].items():
        if not module.takes_adapters or ".attentions." not in path:
            continue
        stem = "lora_unet_" + names[path].replace(".", "_")
        ones = [1] * len(module.kernel)
        down = random.standard_normal((rank, module.in_features, *module.kernel), np.float32)
        up = random.standard_normal((module.out_features, rank, *ones), np.float32)
        tensors[f"{stem}.lora_down.weight"] = (down * 0.05).astype(np.float16)
        tensors[f"{stem}.lora_up.weight"] = (up * 0.01).astype(np.float16)
        tensors[f"{stem}.alpha"] = np.array(rank / 2, np.float16)
    path = folder / f"adapter-{rank}-{seed}.safetensors"
    write_file(path, tensors, {"ss_base_model_version": known.base_versions[0]})
    return path


def make_recipe(folder: Path, base: Path, adapter: Path) -> Path:
    pinned = {"ref": str(adapter), "sha256": sha256_file(adapter), "strength": 0.8}
    # The base's digest is recorded in the output but not what is measured here.
    recipe = {"kind": "bake", "base": {"ref": str(base), "sha256": "0" * 64}, "inputs": [pinned]}
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe), "utf-8")
    return path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--small", action="store_true", help="SD 1.5's size instead of SDXL's")
    parser.add_argument("--dir", type=Path, default=None, help="where to make the files")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-diffusers", action="store_true", help="leave out the slow peer")
    return parser.parse_args()


def _timed(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started = time.perf_counter()
    found = run()
    return found | {"process": time.perf_counter() - started}


def _copy(base: Path, out: Path) -> dict[str, Any]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", str(base), str(out)], check=True)
    with out.open("rb") as file:
        os.fsync(file.fileno())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def _bake(recipe: Path, out: Path, mode: str) -> dict[str, Any]:
    command = [sys.executable, "-c", ENGINE, str(recipe), str(out), mode]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _diffusers(unet: Path, adapter: Path, out: Path, family: str) -> float:
    command = [sys.executable, "-c", DIFFUSERS, str(unet), str(adapter), str(out), family]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(out)
    return float(done.stdout.split()[-1])


def _remove(path: Path) -> None:
    path.unlink()
    os.sync()


def _print(
    family: str, size: int, runs: dict[str, list[dict[str, Any]]], peer: float | None
) -> None:
    best = {mode: min(found, key=lambda run: run["process"]) for mode, found in runs.items()}
    copied = best["cp"]["process"]
    memory = max(run["memory"] for run in runs["bake"] + runs["digest"])
    rows = [
        ("cp, synced", copied, best["cp"]["cpu"]),
        ("bake, engine", best["bake"]["engine"], best["bake"]["cpu"]),
        ("bake, whole process", best["bake"]["process"], None),
        ("bake with SHA-256, engine", best["digest"]["engine"], best["digest"]["cpu"]),
    ]
    print(f"{family} UNet, {size / 1e9:.2f} GB fp16, rank {RANK}, {os.cpu_count()} cores, "
          f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(f"  {'':<28}{'seconds':>9}{'x cp':>7}{'core-s':>9}")
    for what, seconds, cpu in rows:
        used = "" if cpu is None else f"{cpu:9.2f}"
        print(f"  {what:<28}{seconds:>9.2f}{seconds / copied:>7.2f}{used}")
    if peer is not None:
        ratio = peer / best["bake"]["engine"]
        print(f"  {'diffusers load, fuse, save':<28}{peer:>9.2f}   {ratio:.1f} x the engine's time")
    print(f"  {'private memory above torch':<28}{memory:>9.0f} MB")


if __name__ == "__main__":
    main()
