"""How long does it take to combine two adapters at a rank, next to peft's SVD?

    python benchmarks/combine.py [--small] [--dir FOLDER] [--repeat 3] [--no-peft]

Makes two adapters of SDXL's attention and feed-forward layers (722 modules, ranks 16 and 32;
--small: SD 1.5's 192) and combines them to rank 16. peft forms each dense delta and decomposes it;
it is run on one layer of each shape and its time is multiplied by how many layers have that shape,
because all of them would take minutes. The two results are compared on those layers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from bake import Model, make_adapter

from merge.families import FAMILIES
from merge.families.layers import OWN
from merge.formats.hashes import sha256_file

ROOT = Path(__file__).resolve().parents[1]
STRENGTHS = (0.7, 0.5)
RANKS = (16, 32)
WANTED = 16

ENGINE = """
import json, sys, time
from pathlib import Path
import torch
from merge.execute import execute
from merge.plan import plan
from merge.recipe import Recipe
torch.linalg.svd(torch.randn(4, 4))  # loads the library that does it
recipe, out = Recipe.load(Path(sys.argv[1])), Path(sys.argv[2])
started, cpu = time.perf_counter(), time.process_time()
outcome = execute(plan(recipe, {ref: Path(ref) for ref in recipe.refs()}), out)
print(json.dumps({"engine": time.perf_counter() - started, "cpu": time.process_time() - cpu,
                  "error": outcome.certificate["error"]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--small", action="store_true", help="SD 1.5's modules instead of SDXL's")
    parser.add_argument("--dir", type=Path, default=None, help="where to make the files")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-peft", action="store_true", help="leave out the slow peer")
    options = parser.parse_args()
    family = "sd15" if options.small else "sdxl"
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="combine-") as name:
        folder = Path(name)
        paths = [
            make_adapter(folder, Model(FAMILIES[family], "F16"), rank=rank, seed=seed)
            for seed, rank in enumerate(RANKS)
        ]
        recipe = {
            "kind": "merge",
            "inputs": [
                {"ref": str(path), "sha256": sha256_file(path), "strength": strength}
                for path, strength in zip(paths, STRENGTHS, strict=True)
            ],
            "rank": {"fixed": WANTED},
        }
        (folder / "recipe.json").write_text(json.dumps(recipe), "utf-8")
        runs = [_engine(folder) for _ in range(options.repeat)]
        layers = _layers(family)
        peer = None if options.no_peft else _peft(folder, paths, layers)
    engine = min(run["engine"] for run in runs)
    modules = sum(count for _, count in layers.values())
    print(f"{family}, {modules} modules, ranks {RANKS[0]} + {RANKS[1]} -> {WANTED}, "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    cpu = min(run["cpu"] for run in runs)
    print(f"  {'merge, files to file':<34}{engine:>8.2f} s   {cpu:.2f} core-s")
    if peer is not None:
        seconds, difference = peer
        ratio = f"{seconds / engine:.0f} x ours"
        print(f"  {'peft svd, scaled from samples':<34}{seconds:>8.1f} s   {ratio}")
        print(f"  {'largest relative difference':<34}{difference:>8.1e}")
    print(f"  {'truncation and rounding error':<34}{runs[0]['error']:>8.1%}")


def _engine(folder: Path) -> dict[str, Any]:
    out = folder / "out.safetensors"
    command = [sys.executable, "-c", ENGINE, str(folder / "recipe.json"), str(out)]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _layers(family: str) -> dict[tuple[int, ...], tuple[str, int]]:
    """Shape of the flattened delta -> (a key stem of one such layer, how many there are)."""
    known = FAMILIES[family]
    naming = known.kohya_naming.get("unet", OWN)
    names = {layer.module: path for path, layer in known.layers["unet"][naming].items()}
    counts: Counter[tuple[int, ...]] = Counter()
    stems = {}
    for path, module in known.components["unet"].items():
        if module.takes_adapters and ".attentions." in path:
            shape = (module.out_features, module.in_features)
            counts[shape] += 1
            stems[shape] = "lora_unet_" + names[path].replace(".", "_")
    return {shape: (stems[shape], counts[shape]) for shape in counts}


def _peft(
    folder: Path, paths: list[Path], layers: dict[tuple[int, ...], tuple[str, int]]
) -> tuple[float, float]:
    """Seconds for all layers, and how far our result is from peft's on the sampled ones."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    inputs, ours = [load_file(path) for path in paths], load_file(folder / "out.safetensors")
    total, difference = 0.0, 0.0
    for (n_out, n_in), (stem, count) in layers.items():
        layer = torch.nn.Sequential(torch.nn.Linear(n_in, n_out, bias=False))
        model: Any = None
        for index, (tensors, rank) in enumerate(zip(inputs, RANKS, strict=True)):
            alpha = float(tensors[f"{stem}.alpha"])
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])  # type: ignore[arg-type]
            if model is None:
                model = get_peft_model(layer, config, adapter_name="0")
            else:
                model.add_adapter(str(index), config)
            module = model.base_model.model[0]
            for part, role in ((module.lora_A, "down"), (module.lora_B, "up")):
                part[str(index)].weight.data = (
                    tensors[f"{stem}.lora_{role}.weight"].flatten(1).float()
                )
        started = time.perf_counter()
        model.add_weighted_adapter(
            ["0", "1"], list(STRENGTHS), "merged", combination_type="svd", svd_rank=WANTED
        )
        total += count * (time.perf_counter() - started)
        theirs = model.base_model.model[0].get_delta_weight("merged").detach().numpy()
        up, down = ours[f"{stem}.lora_up.weight"], ours[f"{stem}.lora_down.weight"]
        scale = float(ours[f"{stem}.alpha"]) / down.shape[0]
        mine = scale * (up.flatten(1).float() @ down.flatten(1).float()).numpy()
        wrong = float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
        difference = max(difference, wrong)
    return total, difference


if __name__ == "__main__":
    main()
