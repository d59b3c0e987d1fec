"""Factors of every additive layout with the change they must make, by an oracle of their own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.oracles import adalora, experts, loha, lokr, lora, vera

Array = NDArray[np.float64]

# Linear, square, 1x1, 3x3 and 1-D convolutions; no two dimensions of one are equal unless meant.
KINDS = {
    "linear": (6, 8),
    "square": (6, 6),
    "conv1x1": (6, 4, 1, 1),
    "conv3x3": (8, 6, 3, 3),
    "conv1d": (6, 4, 3),
}
ALPHAS = (None, 2.0, 0.0, -1.5)


@dataclass(frozen=True)
class Case:
    """`delta` and `bias` are f(W) - W and f(b) - b; `rank` is None where no product is exact."""

    name: str
    layout: str
    tensors: Mapping[str, torch.Tensor]
    shape: tuple[int, ...]
    delta: Array
    rank: int | None
    bias: Array | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    base: torch.Tensor | None = None  # W as a matrix, where `delta` depends on it


class Maker:
    """Random float64 tensors from one seed."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)


def alpha_of(value: float | None) -> dict[str, torch.Tensor]:
    return {} if value is None else {"alpha": torch.tensor(value, dtype=torch.float64)}


def array(tensor: torch.Tensor) -> Array:
    return np.asarray(tensor.numpy())


def lora_cases() -> Iterator[Case]:
    for kind, shape in KINDS.items():
        for alpha in ALPHAS:
            make, (out, inner, *kernel) = Maker(1), shape
            down, up = make(3, inner, *kernel), make(out, 3, *[1] * len(kernel))
            change = lora.delta(array(down), array(up), alpha)
            tensors = {"down": down, "up": up, **alpha_of(alpha)}
            yield Case(f"lora {kind} alpha {alpha}", "lora", tensors, shape, change, 3)
    make = Maker(2)
    down, up = make(5, 4), make(6, 5)
    change = lora.delta(array(down), array(up), None)
    plain = {"down": down, "up": up, "alpha": torch.tensor([2.0])}
    yield Case(
        "lora facts over alpha", "lora", plain, (6, 4), 0.3 * change, 5, facts={"scale": 0.3}
    )
    scaled = {**plain, "scale": torch.tensor([0.7], dtype=torch.float64)}
    yield Case("lora scale over alpha", "lora", scaled, (6, 4), 0.7 * change, 5)
    learned = {**plain, "scalar": torch.tensor(-0.5, dtype=torch.float64)}
    yield Case("lora scalar times alpha / rank", "lora", learned, (6, 4), -0.2 * change, 5)
    yield Case(
        "lora linear on a 1x1", "lora", plain, (6, 4, 1, 1), 0.4 * change[..., None, None], 5
    )
    yield Case("lora of an attention", "lora-mha", plain, (6, 4), 0.4 * change, 5)
    # DyLoRA of LyCORIS stores a convolution's up as a matrix.
    conv = make(5, 4, 3, 3)
    yield Case(
        "lora up without ones",
        "lora",
        {"down": conv, "up": up},
        (6, 4, 3, 3),
        lora.delta(array(conv), array(up), None),
        5,
    )
    biased = {**plain, "up_bias": make(6)}
    yield Case(
        "lora bias", "lora", biased, (6, 4), 0.4 * change, 5, bias=0.4 * array(biased["up_bias"])
    )
    for alpha in ALPHAS:
        core = {"down": make(3, 4, 1, 1), "mid": make(3, 3, 3, 2), "up": make(6, 3, 1, 1)}
        change = lora.tucker(*(array(core[role]) for role in ("down", "mid", "up")), alpha)
        tensors = {**core, **alpha_of(alpha)}
        yield Case(f"lora tucker alpha {alpha}", "lora", tensors, (6, 4, 3, 2), change, 3)
    sparse = {
        **plain,
        "bias_indices": torch.tensor([[0, 5, 5], [1, 2, 2]], dtype=torch.int16),
        "bias_values": torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64),
        "bias_size": torch.tensor([6, 4], dtype=torch.int16),
    }
    residual = np.zeros((6, 4))
    residual[0, 1], residual[5, 2] = 3.0, 9.0  # two values at one place add up
    change = lora.delta(array(down), array(up), None)
    yield Case("lora residual", "lora", sparse, (6, 4), 0.4 * (change + residual), None)


def spelling_cases() -> Iterator[Case]:
    make = Maker(3)
    down, up = make(3, 4), make(8, 3)
    change = 0.5 * lora.delta(array(down), array(up), None)
    half = {"scale": 0.5}
    mlx = {"mlx_down": down.mT.contiguous(), "mlx_up": up.mT.contiguous()}
    yield Case("mlx", "lora-mlx", mlx, (8, 4), change, 3, facts=half)

    tune = {"torchtune_down": down, "torchtune_up": up}
    plain = {**half, "rope_heads": 0}
    yield Case("torchtune value", "lora-torchtune", tune, (8, 4), change, 3, facts=plain)
    counted = {**tune, "alpha": torch.tensor(1.5)}
    yield Case(
        "torchtune alpha", "lora-torchtune", counted, (8, 4), change, 3, facts={"rope_heads": 0}
    )
    # Two heads of four rows: pairs (0, 1), (2, 3) become halves 0, 2 and 1, 3.
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    rotary = {**half, "rope_heads": 2}
    yield Case("torchtune query", "lora-torchtune", tune, (8, 4), change[order], 3, facts=rotary)

    for alpha in ALPHAS:
        table = {"embedding_down": make(3, 9), "embedding_up": make(4, 3), **alpha_of(alpha)}
        change = lora.delta(array(table["embedding_down"]), array(table["embedding_up"]), alpha).T
        yield Case(f"embedding alpha {alpha}", "lora-embedding", table, (9, 4), change, 3)

    for shape in ((8, 4), (6, 4, 1, 1), (6, 4, 3, 3)):
        inner = int(np.prod(shape[1:]))
        pruned = {"down": make(3, inner), "up": make(shape[0], 3), "lora_E": make(3, 1)}
        change = adalora.delta(
            array(pruned["down"]), array(pruned["lora_E"]), array(pruned["up"]), -0.3
        )
        tensors = {**pruned, "ranknum": torch.tensor([12.0])}
        yield Case(
            f"adalora {shape}",
            "adalora",
            tensors,
            shape,
            change.reshape(shape),
            3,
            facts={"scale": -0.3},
        )

    held = {**tensors, "alpha": torch.tensor(3.0), "ranknum": torch.tensor([7.0])}
    held["ranknum"] = held["ranknum"].double()
    change = change / -0.3 * 3 / (7 + 1e-5)
    yield Case("adalora alpha", "adalora", held, shape, change.reshape(shape), 3)

    for shape in ((8, 4), (5, 7), (9, 9)):
        shared = {"vera_A": make(3, 9), "vera_B": make(9, 3)}
        tensors = {"vera_lambda_b": make(shape[0]), "vera_lambda_d": make(3), **shared}
        change = vera.delta(
            *(array(tensors[f"vera_{name}"]) for name in ("lambda_b", "lambda_d", "B", "A")), shape
        )
        yield Case(f"vera {shape}", "vera", tensors, shape, change, 3)


def experts_cases() -> Iterator[Case]:
    make = Maker(4)
    down, up = make(5 * 2, 4), make(3, 2 * 5)
    change = experts.delta(array(down), array(up), 5, 0.75)
    tensors = {"down": down, "up": up, "alpha": torch.tensor(1.5, dtype=torch.float64)}
    yield Case("experts (out, in)", "lora-experts", tensors, (5, 3, 4), change, None)
    other = change.transpose(0, 2, 1)
    yield Case("experts (in, out)", "lora-experts", tensors, (5, 4, 3), other, None)
    square = {"down": down, "up": make(4, 2 * 5)}
    change = experts.delta(array(down), array(square["up"]), 5, 1.0)
    for is_transposed in (False, True):
        expected = change.transpose(0, 2, 1) if is_transposed else change
        facts = {"experts_transposed": is_transposed}
        yield Case(
            f"experts square {is_transposed}",
            "lora-experts",
            square,
            (5, 4, 4),
            expected,
            None,
            facts=facts,
        )
    dense = lora.delta(array(down), array(up), 1.5)
    yield Case("experts of one matrix", "lora-experts", tensors, (3, 4), dense, 10)


def loha_cases() -> Iterator[Case]:
    for kind, shape in KINDS.items():
        make, (out, *rest) = Maker(5), shape
        inner = int(np.prod(rest))
        for alpha in ALPHAS:
            # Ranks differ, as they may: alpha is over the first.
            plain = {
                "hada_w1_a": make(out, 3),
                "hada_w1_b": make(3, inner),
                "hada_w2_a": make(out, 2),
                "hada_w2_b": make(2, inner),
            }
            a, b, c, d = (array(tensor) for tensor in plain.values())
            change = loha.delta(loha.product(a, b), loha.product(c, d), alpha, 3).reshape(shape)
            tensors = {**plain, **alpha_of(alpha)}
            yield Case(f"loha {kind} alpha {alpha}", "loha", tensors, shape, change, 6)
        if len(rest) > 1:
            kernel = {
                **tensors,
                **{r: plain[r].reshape(-1, *rest) for r in ("hada_w1_b", "hada_w2_b")},
            }
            yield Case(f"loha {kind} w_b with its kernel", "loha", kernel, shape, change, 6)
    for alpha in ALPHAS:
        make = Maker(6)
        core = {
            "hada_t1": make(3, 3, 3, 2),
            "hada_w1_a": make(3, 6),
            "hada_w1_b": make(3, 4),
            "hada_t2": make(3, 3, 3, 2),
            "hada_w2_a": make(3, 6),
            "hada_w2_b": make(3, 4),
        }
        t1, a1, b1, t2, a2, b2 = (array(tensor) for tensor in core.values())
        change = loha.delta(loha.tucker(t1, a1, b1), loha.tucker(t2, a2, b2), alpha, 3)
        tensors = {**core, **alpha_of(alpha)}
        yield Case(f"loha tucker alpha {alpha}", "loha", tensors, (6, 4, 3, 2), change, 9)
    stated = {**tensors, "scalar": torch.tensor([3.0])}
    facts = {"scale": 0.25}
    change = change / (-1.5 / 3) * 0.75
    yield Case("loha facts and scalar", "loha", stated, (6, 4, 3, 2), change, 9, facts=facts)


def lokr_cases() -> Iterator[Case]:
    """w1 (2, 3) or (3, 2), w2 (4, 2, *kernel); each side whole or cut, w2 also by a Tucker core."""
    for kernel in ((), (1, 1), (3, 3)):
        for left in ("whole", "cut"):
            for right in ("whole", "cut", "tucker"):
                if right == "tucker" and not kernel:
                    continue
                for alpha in ALPHAS if right != "whole" or left != "whole" else (None, 1e5):
                    yield _lokr(kernel, left, right, alpha)
    wide = _lokr((), "whole", "cut", 2.0, a=3, c=2)
    yield replace(wide, name="lokr tall w1")
    for left, right in (("whole", "whole"), ("whole", "cut")):
        made = _lokr((), left, right, None)
        yield replace(
            made,
            name=f"lokr peft {left} {right}",
            delta=0.4 * made.delta,
            facts={"scale": 0.4},
            tensors={**made.tensors, **alpha_of(1e5)},
        )


def _lokr(
    kernel: tuple[int, ...], left: str, right: str, alpha: float | None, a: int = 2, c: int = 3
) -> Case:
    make, tensors = Maker(7), alpha_of(alpha)
    rank1 = rank2 = None
    if left == "whole":
        tensors["lokr_w1"] = make(a, c)
        w1, m1 = array(tensors["lokr_w1"]), min(a, c)
    else:
        tensors |= {"lokr_w1_a": make(a, 1), "lokr_w1_b": make(1, c)}
        w1 = loha.product(array(tensors["lokr_w1_a"]), array(tensors["lokr_w1_b"]))
        rank1 = m1 = 1
    if right == "whole":
        tensors["lokr_w2"] = make(4, 2, *kernel)
        w2, m2 = array(tensors["lokr_w2"]), min(4, 2 * int(np.prod(kernel)))
    elif right == "cut":
        tensors |= {"lokr_w2_a": make(4, 3), "lokr_w2_b": make(3, 2 * int(np.prod(kernel)))}
        flat = loha.product(array(tensors["lokr_w2_a"]), array(tensors["lokr_w2_b"]))
        w2, rank2, m2 = flat.reshape(4, 2, *kernel), 3, 3
        if kernel == (3, 3):  # as OneTrainer stores it
            tensors["lokr_w2_b"] = tensors["lokr_w2_b"].reshape(3, 2, *kernel)
    else:
        tensors |= {
            "lokr_t2": make(3, 3, *kernel),
            "lokr_w2_a": make(3, 4),
            "lokr_w2_b": make(3, 2),
        }
        w2 = loha.tucker(*(array(tensors[f"lokr_{role}"]) for role in ("t2", "w2_a", "w2_b")))
        rank2 = m2 = 3
    change = lokr.scale(alpha, rank1, rank2) * lokr.kronecker(w1, w2)
    rank = None if rank1 is None and rank2 is None else m1 * m2
    name = f"lokr {kernel} {left} {right} alpha {alpha}"
    return Case(name, "lokr", tensors, change.shape, change, rank)


def stored_cases() -> Iterator[Case]:
    make = Maker(8)
    for kind, shape in {**KINDS, "vector": (6,)}.items():
        diff, diff_b = make(*shape), make(shape[0])
        both = {"diff": diff, "diff_b": diff_b, "alpha": torch.tensor(4.0)}
        yield Case(f"full {kind}", "full", both, shape, array(diff), None, bias=array(diff_b))
        yield Case(f"full {kind} weight alone", "full", {"diff": diff}, shape, array(diff), None)
        nothing = np.zeros(shape)
        alone = {"diff_b": diff_b}
        yield Case(f"full {kind} bias alone", "full", alone, shape, nothing, 0, bias=array(diff_b))
        base = make(*shape).reshape(shape[0], -1)
        change = array(diff) - array(base).reshape(shape)
        was = array(old_bias(shape[0]))
        values = {"weight": diff, "bias": diff_b}
        changed = array(diff_b) - was
        yield Case(
            f"replacement {kind}",
            "replacement",
            values,
            shape,
            change,
            None,
            bias=changed,
            base=base,
        )
        yield Case(
            f"set_weight {kind}",
            "replacement",
            {"set_weight": diff},
            shape,
            change,
            None,
            base=base,
        )
        only = {"bias": diff_b}
        yield Case(f"bias {kind}", "replacement", only, shape, nothing, 0, bias=array(diff_b) - was)
    w, b = make(6), make(6)
    norms = {"w_norm": w, "b_norm": b}
    yield Case("norm", "norm", norms, (6,), array(w), None, bias=array(b))
    yield Case("norm without bias", "norm", {"w_norm": w}, (6,), array(w), None)
    table, rows = make(9, 4), make(3, 4)
    change = np.zeros((9, 4))
    for row, token in enumerate((7, 0, 4)):
        change[token] = array(rows[row] - table[token])
    yield Case(
        "tokens",
        "tokens",
        {"trainable_tokens_delta": rows},
        (9, 4),
        change,
        None,
        facts={"token_ids": (7, 0, 4)},
        base=table,
    )


def old_bias(out: int) -> torch.Tensor:
    """The bias every case's layer has."""
    return Maker(10)(out)


CASES = [
    *lora_cases(),
    *spelling_cases(),
    *experts_cases(),
    *loha_cases(),
    *lokr_cases(),
    *stored_cases(),
]
