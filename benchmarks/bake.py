"""How long does it take to bake adapters into a checkpoint, next to copying it and to other engines?

    python benchmarks/bake.py [--small | --flux] [--few] [--ranks 4,16,128] [--adapters 1,3]
                              [--dir FOLDER] [--repeat 3] [--no-peers]

Makes an SDXL-size UNet of random fp16 weights (5.1 GB; --small: SD 1.5's 1.7 GB; --flux: a sparse
bf16 file of FLUX.1's transformer, 23.8 GB) and adapters of its attention and feed-forward layers
(--few: of eight of them), all removed at the end. Needs three times the base in free disk space and,
for the peers, twice in memory. The base is in the page cache if it fits, and every output is synced.
Each figure is the best of the repetitions, taken in turns.
Peers: diffusers load + fuse + save, and sd-mecha where it is installed (it writes the touched
tensors alone). kohya's scripts are on no package index, and mergekit bakes no diffusion adapters.
"""

import argparse
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from merge.families import FAMILIES, Family
from merge.families.layers import ORIGINAL, Module, parameter_key
from merge.formats.hashes import sha256_file
from merge.formats.writer import FileWriter, layout, write_file

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
    while not stop.wait(0.02):
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

MECHA = """
import os, sys, time
import torch
import sd_mecha
from sd_mecha.extensions.builtin.merge_methods import linear
started = time.perf_counter()
base = sd_mecha.model(sys.argv[1], config=sys.argv[4])
change = sd_mecha.convert(sd_mecha.model(sys.argv[2]), sys.argv[4])
sd_mecha.merge(
    linear.add_difference(base, change, alpha=0.8), output=sys.argv[3], merge_device="cpu",
    merge_dtype=torch.float32, output_dtype=torch.float16, strict_mandatory_keys=False,
)
with open(sys.argv[3], "rb") as opened:
    os.fsync(opened.fileno())
print(time.perf_counter() - started)
"""
MECHA_CONFIGS = {"sdxl": "sdxl-sgm", "sd15": "sd1-ldm"}


@dataclass(frozen=True)
class Model:
    """What is baked into: a family's denoiser, stored as `dtype`."""

    family: Family
    dtype: str

    @property
    def modules(self) -> dict[str, Module]:
        return dict(self.family.components[self.family.denoiser])

    def adapted(self, few: bool) -> dict[str, Module]:
        """Attention and feed-forward layers: 722 of SDXL, 192 of SD 1.5, 494 of FLUX.1."""
        found = {
            path: module
            for path, module in self.modules.items()
            if module.takes_adapters and (".attentions." in path or "transformer_blocks." in path)
        }
        return dict(list(found.items())[:8]) if few else found


def main() -> None:
    options = _options()
    name = "flux1" if options.flux else "sd15" if options.small else "sdxl"
    model = Model(FAMILIES[name], "BF16" if options.flux else "F16")
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="bake-") as folder_name:
        folder = Path(folder_name)
        base = make_base(folder / "base", model, sparse=options.flux)
        out = folder / "out.safetensors"
        copies: list[dict[str, Any]] = []
        for rank in options.ranks:
            for n in options.adapters:
                recipe = make_recipe(folder, base, model, rank, n, few=options.few)
                runs: dict[str, list[dict[str, Any]]] = {"cp": copies, "bake": [], "digest": []}
                for _ in range(options.repeat):
                    copies.append(_timed(lambda: _copy(base, out)))
                    _remove(out)
                    for mode in ("bake", "digest"):
                        found = _timed(partial(_bake, recipe, out, mode))
                        runs[mode].append(found)
                        _remove(out)
                _print(model, base.stat().st_size, rank, n, runs)
        if not options.no_peers and not options.flux:
            _peers(folder, base, model)


def make_base(folder: Path, model: Model, *, sparse: bool) -> Path:
    """The denoiser in diffusers' layout with weights of a plausible size, and its config.

    A sparse one is a header and a hole: all weights are 0.
    """
    folder.mkdir()
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for name, module in model.modules.items():
        tensors.append((parameter_key(name, module.kind, "weight"), model.dtype, module.shape))
        if module.has_bias:
            tensors.append((f"{name}.bias", model.dtype, module.shape[:1]))
    path = folder / "diffusion_pytorch_model.safetensors"
    if sparse:
        placed = layout(tensors, {"format": "pt"})
        path.write_bytes(placed.head)
        os.truncate(path, placed.file_size)
        return path
    noise = np.random.default_rng(0).standard_normal(2**24).astype(np.float32)
    block = (noise * 0.03).astype(np.float16).tobytes()
    with FileWriter(path, tensors, {"format": "pt"}) as writer:
        for index, (key, info) in enumerate(writer.layout.tensors.items()):
            # Another place of the noise for every tensor, so that no two are alike.
            shift = 2 * (index * 7919 % 2**20)
            for start in range(0, info.size_bytes, len(block) - 2**21):
                piece = min(len(block) - 2**21, info.size_bytes - start)
                writer.write(key, block[shift : shift + piece], start)
    (folder / "config.json").write_text(json.dumps(unet_config(model.family.name)), "utf-8")
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


def make_adapter(
    folder: Path, model: Model, *, rank: int = RANK, seed: int = 1, few: bool = False
) -> Path:
    """A LoRA of attention and feed-forward layers: for UNets as kohya writes it, else as diffusers."""
    random = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for path, module in model.adapted(few).items():
        ones = [1] * len(module.kernel)
        down = random.standard_normal((rank, module.in_features, *module.kernel), np.float32)
        up = random.standard_normal((module.out_features, rank, *ones), np.float32)
        down_key, up_key, alpha_key = adapter_keys(model.family, path)
        tensors[down_key] = (down * 0.05).astype(np.float16)
        tensors[up_key] = (up * 0.01).astype(np.float16)
        if alpha_key:
            tensors[alpha_key] = np.array(rank / 2, np.float16)
    path_out = folder / f"adapter-{rank}-{seed}.safetensors"
    versions = model.family.base_versions
    write_file(path_out, tensors, {"ss_base_model_version": versions[0]} if versions else {})
    return path_out


def adapter_keys(family: Family, path: str) -> tuple[str, str, str]:
    if family.denoiser != "unet":
        return f"transformer.{path}.lora_A.weight", f"transformer.{path}.lora_B.weight", ""
    named = original(family)[path] if family.kohya_naming.get("unet") == ORIGINAL else path
    stem = "lora_unet_" + named.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def original(family: Family) -> dict[str, str]:
    """Our own path -> the original one."""
    layers = family.tables[family.denoiser].layers[ORIGINAL].values()
    return {layer.module: layer.path for layer in layers if layer.module is not None}


def make_recipe(
    folder: Path, base: Path, model: Model, rank: int, n: int, *, few: bool = False
) -> Path:
    adapters = [make_adapter(folder, model, rank=rank, seed=seed + 1, few=few) for seed in range(n)]
    inputs = [
        {"ref": str(path), "sha256": sha256_file(path), "strength": 0.8 / (number + 1)}
        for number, path in enumerate(adapters)
    ]
    # The base's digest is recorded in the output but not what is measured here.
    recipe = {"kind": "bake", "base": {"ref": str(base), "sha256": "0" * 64}, "inputs": inputs}
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe), "utf-8")
    return path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="SD 1.5's size instead of SDXL's")
    size.add_argument("--flux", action="store_true", help="FLUX.1's size, from a sparse file")
    parser.add_argument("--few", action="store_true", help="adapters of eight modules")
    parser.add_argument("--ranks", type=_numbers, default=[RANK], help="one table for each")
    parser.add_argument("--adapters", type=_numbers, default=[1], help="how many at once")
    parser.add_argument("--dir", type=Path, default=None, help="where to make the files")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true", help="leave out the slow peers")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _timed(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started = time.perf_counter()
    found = run()
    return found | {"process": time.perf_counter() - started}


def _copy(base: Path, out: Path) -> dict[str, Any]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "--sparse=never", str(base), str(out)], check=True)
    with out.open("rb") as file:
        os.fsync(file.fileno())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def _bake(recipe: Path, out: Path, mode: str) -> dict[str, Any]:
    command = [sys.executable, "-c", ENGINE, str(recipe), str(out), mode]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _remove(path: Path) -> None:
    path.unlink()
    os.sync()


def _print(
    model: Model, size: int, rank: int, n: int, runs: dict[str, list[dict[str, Any]]]
) -> None:
    best = {mode: min(found, key=lambda run: run["process"]) for mode, found in runs.items()}
    copied = best["cp"]["process"]
    memory = max(run["memory"] for run in runs["bake"] + runs["digest"])
    rows = [
        ("cp, synced", copied, best["cp"]["cpu"]),
        ("bake, engine", best["bake"]["engine"], best["bake"]["cpu"]),
        ("bake, whole process", best["bake"]["process"], None),
        ("bake with SHA-256, engine", best["digest"]["engine"], best["digest"]["cpu"]),
        ("bake with SHA-256, process", best["digest"]["process"], None),
    ]
    print(
        f"{model.family.name} denoiser, {size / 1e9:.2f} GB {model.dtype}, "
        f"{n} adapter{'s' if n > 1 else ''} of rank {rank}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(f"  {'':<28}{'seconds':>9}{'x cp':>7}{'core-s':>9}")
    for what, seconds, cpu in rows:
        used = "" if cpu is None else f"{cpu:9.2f}"
        print(f"  {what:<28}{seconds:>9.2f}{seconds / copied:>7.2f}{used}")
    print(f"  {'private memory above torch':<28}{memory:>9.0f} MB", flush=True)


def _peers(folder: Path, base: Path, model: Model) -> None:
    """Other engines with one adapter of rank 16, and ours beside them."""
    name = model.family.name
    adapter = make_adapter(folder, model)
    recipe = make_recipe(folder, base, model, RANK, 1)
    out = folder / "out.safetensors"
    ours = _bake(recipe, out, "bake")["engine"]
    _remove(out)
    peer = folder / "peer"
    seconds = _script(DIFFUSERS, [str(base.parent), str(adapter), str(peer), name])
    shutil.rmtree(peer)
    _print_peer("diffusers load, fuse, save", seconds, ours)
    if importlib.util.find_spec("sd_mecha") is None:
        print("  sd-mecha is not installed (pip install sd-mecha)")
        return
    single = _as_single_file(folder / "single.safetensors", base, model)
    written = folder / "mecha.safetensors"
    seconds = _script(MECHA, [str(single), str(adapter), str(written), MECHA_CONFIGS[name]])
    _print_peer("sd-mecha", seconds, ours)


def _print_peer(name: str, seconds: float, ours: float) -> None:
    print(f"  {name:<28}{seconds:>9.2f}   {seconds / ours:.1f} x the engine's {ours:.2f}")


def _script(script: str, arguments: Sequence[str]) -> float:
    command = [sys.executable, "-c", script, *arguments]
    said = subprocess.check_output(command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
    return float(said.split()[-1])


def _as_single_file(target: Path, base: Path, model: Model) -> Path:
    """The same weights in the names of the original code."""
    from merge.formats.reader import TensorFile

    names = original(model.family)
    with TensorFile(base) as file:
        renamed = {
            key: f"model.diffusion_model.{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}"
            for key in file.header.tensors
        }
        tensors = [(renamed[k], info.dtype, info.shape) for k, info in file.header.tensors.items()]
        with FileWriter(target, tensors, {}) as writer:
            for key, name in renamed.items():
                writer.write(name, file.read(key))
    return target


if __name__ == "__main__":
    main()
