"""How one other tool combines adapters, on one layer of each shape; started by combine.py.

Takes {"peer", "paths", "layers": [[down, up, alpha key], ...], "strengths", "rank", "density",
"out"} as its argument, writes the results to `out` and prints the seconds for each layer and the
peak of private memory above what the imports take.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Layer = list[tuple[torch.Tensor, torch.Tensor, float]]  # down, up and alpha of each adapter
Result = tuple[torch.Tensor, torch.Tensor]  # down and up of scale 1
Job = dict[str, Any]

# Beyond this size a layer is timed once: its decomposition takes seconds.
REPEATED = 2**21
CLAMP_QUANTILE = 0.99  # of the entries of the singular vectors, in kohya's svd_merge_lora.py


def main() -> None:
    job = json.loads(sys.argv[1])
    prepare = PEERS[job["peer"]]
    _import(job["peer"])
    results, seconds = {}, []
    with private_peak() as peak:
        files = [load_file(path) for path in job["paths"]]
        for index, keys in enumerate(job["layers"]):
            layer = [_read(tensors, keys) for tensors in files]
            combine = prepare(layer, job)
            result, spent = _timed(combine, layer[0][0].shape[1] * layer[0][1].shape[0])
            seconds.append(spent)
            results[f"{index}.down"], results[f"{index}.up"] = (its.contiguous() for its in result)
    save_file(results, job["out"])
    print(json.dumps({"seconds": seconds, "memory": peak[0]}))


def dense(layer: Layer, job: Job) -> torch.Tensor:
    """The weighted sum multiplied out, adapter after adapter."""
    total = torch.zeros(layer[0][1].shape[0], layer[0][0].shape[1])
    for (down, up, alpha), strength in zip(layer, job["strengths"], strict=True):
        total += strength * (alpha / down.shape[0]) * (up @ down)
    return total


def kohya(layer: Layer, job: Job, *, clamp: bool) -> Callable[[], Result]:
    """The dense sum, all of its singular vectors, and the largest entries of those clamped."""

    def combine() -> Result:
        u, values, vh = torch.linalg.svd(dense(layer, job))
        up, down = u[:, : job["rank"]] * values[: job["rank"]], vh[: job["rank"]]
        if clamp:
            entries = torch.cat([up.flatten(), down.flatten()])
            # torch.quantile takes 16 Mi numbers; this is the same one.
            highest = entries.kthvalue(int(CLAMP_QUANTILE * (entries.numel() - 1)) + 1).values
            up, down = up.clamp(-highest, highest), down.clamp(-highest, highest)
        return down, up

    return combine


def peft(layer: Layer, job: Job, *, kind: str) -> Callable[[], Result]:
    """add_weighted_adapter, on a model of this one layer that holds the adapters."""
    from peft import LoraConfig, get_peft_model

    n_out, n_in = layer[0][1].shape[0], layer[0][0].shape[1]
    model: Any = None
    for index, (down, up, alpha) in enumerate(layer):
        config = LoraConfig(r=down.shape[0], lora_alpha=alpha, target_modules=["0"])
        if model is None:
            plain = torch.nn.Sequential(torch.nn.Linear(n_in, n_out, bias=False))
            model = get_peft_model(plain, config, adapter_name="0")
        else:
            model.add_adapter(str(index), config)
        module = model.base_model.model[0]
        module.lora_A[str(index)].weight.data = down
        module.lora_B[str(index)].weight.data = up
    names, numbers = [str(index) for index in range(len(layer))], count()
    options = {} if kind == "cat" else {"svd_rank": job["rank"]}
    if kind == "ties_svd":
        options["density"] = job["density"]

    def combine() -> Result:
        name = f"merged-{next(numbers)}"
        model.add_weighted_adapter(names, job["strengths"], name, combination_type=kind, **options)
        module = model.base_model.model[0]
        down, up = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
        return down, up * module.scaling[name]

    return combine


def mergekit(layer: Layer, job: Job) -> Callable[[], Result]:
    """Its extraction of an adapter, from the dense sum: its own way there is to merge checkpoints
    that the adapters were baked into, and to take the base away again.
    """
    from mergekit.scripts.extract_lora import TaskVectorDecompositionTask

    task = TaskVectorDecompositionTask.model_construct(
        max_rank=job["rank"], distribute_scale=True, transpose=False, sv_epsilon=0
    )
    return lambda: task.execute(task_vector=dense(layer, job))


PEERS: dict[str, Callable[[Layer, Job], Callable[[], Result]]] = {
    "peft svd": lambda layer, job: peft(layer, job, kind="svd"),
    "peft cat": lambda layer, job: peft(layer, job, kind="cat"),
    "peft ties_svd": lambda layer, job: peft(layer, job, kind="ties_svd"),
    "kohya svd": lambda layer, job: kohya(layer, job, clamp=True),
    "kohya svd, not clamped": lambda layer, job: kohya(layer, job, clamp=False),
    "mergekit extract": mergekit,
}


def _import(peer: str) -> None:
    """What the tool itself takes is not what is measured; nor is loading the library for algebra."""
    torch.linalg.svd(torch.randn(4, 4))
    tiny = [(torch.randn(2, 6), torch.randn(5, 2), 2.0)]
    PEERS[peer](tiny, {"strengths": [1.0], "rank": 1, "density": 0.5})()


def _read(
    tensors: dict[str, torch.Tensor], keys: list[str]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    down, up = (tensors[key].flatten(1).float() for key in keys[:2])
    return down, up, float(tensors[keys[2]]) if keys[2] else float(down.shape[0])


def _timed(combine: Callable[[], Result], elements: int) -> tuple[Result, float]:
    times = []
    for _ in range(1 if elements > REPEATED else 3):
        started = time.perf_counter()
        result = combine()
        times.append(time.perf_counter() - started)
    return result, min(times)


@contextmanager
def private_peak() -> Iterator[list[float]]:
    """In its first entry the most private memory that was held meanwhile, above that before, in MiB."""
    before, peak, stop = _private(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], _private() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def _private() -> float:
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
