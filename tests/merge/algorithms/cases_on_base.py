"""Factors of every layout whose change depends on the base, with f(W) and f(b) by an oracle."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from merge.algorithms.change import Needs
from tests.merge.algorithms.cases import Array, Maker, alpha_of, array
from tests.oracles import boft, dora, glora, glora_paper, hira, hra, ia3, loha, lora, oft

# The widths of all of them, and their rows, hold whole blocks of 4 entries.
KINDS = {
    "linear": (12, 8),
    "square": (8, 8),
    "conv1x1": (12, 4, 1, 1),
    "conv3x3": (8, 4, 3, 3),
    "conv1d": (8, 12, 3),
}


@dataclass(frozen=True)
class OnBase:
    """f(W) is `changed`, f(b) - b of a layer's bias is `bias_change`, of none `no_bias_change`."""

    name: str
    layout: str
    tensors: Mapping[str, torch.Tensor]
    weight: Array
    changed: Array
    needs: Needs = Needs.ROWS
    bias: Array | None = None
    bias_change: Array | None = None
    no_bias_change: Array | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def _kinds() -> Iterator[tuple[str, tuple[int, ...], Maker, Array]]:
    for seed, (kind, shape) in enumerate(KINDS.items()):
        make = Maker(100 + seed)
        yield kind, shape, make, array(make(*shape))


def dora_cases() -> Iterator[OnBase]:
    for kind, shape, make, weight in _kinds():
        out, inner, *kernel = shape
        ones = [1] * len(kernel)
        down, up = make(3, inner, *kernel), make(out, 3, *ones)
        lora_of = {"down": down, "up": up, "alpha": torch.tensor(1.5, dtype=torch.float64)}
        delta = lora.delta(array(down), array(up), 1.5)
        per_row, per_channel = make(out), make(inner)
        by_row = dora.rows(weight, delta, array(per_row))
        by_channel = dora.channels(weight, delta, array(per_channel))
        forms = {"column": per_row.reshape(out, 1, *ones), "vector": per_row}
        if kernel and out != inner:
            forms["peft's"] = per_row.reshape(1, out, *ones)
        for form, magnitude in forms.items():
            tensors = {**lora_of, "dora_scale": magnitude}
            yield OnBase(f"dora output {form} {kind}", "lora", tensors, weight, by_row)
        forms = {"row": per_channel.reshape(1, inner, *ones)}
        if out != inner:
            forms["vector"] = per_channel
        for form, magnitude in forms.items():
            tensors = {**lora_of, "dora_scale": magnitude}
            name = f"dora input {form} {kind}"
            yield OnBase(name, "lora", tensors, weight, by_channel, Needs.WHOLE)
    yield from _dora_on_others()


def _dora_on_others() -> Iterator[OnBase]:
    make = Maker(200)
    weight, m = array(make(6, 8)), make(6, 1)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    pairs = dict(zip(names, (make(6, 2), make(2, 8), make(6, 3), make(3, 8)), strict=True))
    w1_a, w1_b, w2_a, w2_b = (array(pairs[name]) for name in names)
    delta = loha.delta(loha.product(w1_a, w1_b), loha.product(w2_a, w2_b), None, 2)
    changed = dora.rows(weight, delta, array(m).ravel())
    yield OnBase("dora of loha", "loha", {**pairs, "dora_scale": m}, weight, changed)
    a1, a2, b1, b2 = make(8, 2), make(2, 8), make(6, 2), make(2, 8)
    delta = glora.delta(weight, *(array(t) for t in (a2, a1, b2, b1)), None)
    inner = {"a1": a1, "a2": a2, "b1": b1, "b2": b2, "dora_scale": m}
    changed = dora.rows(weight, delta, array(m).ravel())
    yield OnBase("dora of glora", "glora", inner, weight, changed)
    diff = make(6, 8)
    changed = dora.rows(weight, array(diff), array(m).ravel())
    yield OnBase("dora of full", "full", {"diff": diff, "dora_scale": m}, weight, changed)
    blocks = make(3, 2, 2)
    rotated = oft.rows_rotated(weight, oft.lycoris_rotation(array(blocks), None))
    changed = dora.rows(weight, rotated - weight, array(m).ravel())
    inner = {"oft_blocks": blocks, "dora_scale": m}
    yield OnBase("dora of oft", "oft", inner, weight, changed, Needs.WHOLE)
    down, up, bias = make(2, 8), make(6, 2), make(6)
    delta = lora.delta(array(down), array(up), None)
    tensors = {"down": down, "up": up, "up_bias": bias, "dora_scale": m}
    changed = dora.rows(weight, delta, array(m).ravel())
    added = array(bias)
    yield OnBase(
        "dora of a bias beside up",
        "lora",
        tensors,
        weight,
        changed,
        bias=array(make(6)),
        bias_change=added,
        no_bias_change=added,
    )
    # A zero row keeps its direction: none.
    weight = weight.copy()
    weight[2], up = 0, up.clone()
    up[2] = 0
    delta = lora.delta(array(down), array(up), None)
    tensors = {"down": down, "up": up, "dora_scale": m}
    changed = dora.rows(weight, delta, array(m).ravel())
    yield OnBase("dora with a zero row", "lora", tensors, weight, changed)
    # PEFT's embeddings have a magnitude for each of their dimensions, MLX's for each token.
    table, down, up = array(make(10, 4)), make(2, 10), make(4, 2)
    delta = lora.delta(array(down), array(up), None).T
    for name, magnitude, oracle, needs in (
        ("dora of an embedding's dimensions", make(4), dora.channels, Needs.WHOLE),
        ("dora of an embedding's tokens", make(10), dora.rows, Needs.ROWS),
    ):
        tensors = {"embedding_down": down, "embedding_up": up, "dora_scale": magnitude}
        changed = oracle(table, delta, array(magnitude))
        yield OnBase(name, "lora-embedding", tensors, table, changed, needs)
    square, down, up, m = array(make(4, 4)), make(2, 4), make(4, 2), make(4)
    delta = lora.delta(array(down), array(up), None)
    tensors = {"down": down, "up": up, "dora_scale": m}
    facts = {"dora_axis": "input"}
    changed = dora.channels(square, delta, array(m))
    yield OnBase("dora axis said", "lora", tensors, square, changed, Needs.WHOLE, facts=facts)
    # With an epsilon the norm is a little more: at 1e300 nothing of the direction is left.
    zero = np.zeros_like(square)
    yield OnBase("dora epsilon", "lora", tensors, square, zero, facts={"dora_eps": 1e300})


def glora_cases() -> Iterator[OnBase]:
    for kind, shape, make, weight in _kinds():
        out, inner, *kernel = shape
        ones = [1] * len(kernel)
        a_down, a_up = make(3, inner, *ones), make(inner, 3, *ones)
        b_down, b_up = make(3, inner, *kernel), make(out, 3, *ones)
        layouts = {
            "new": {"a1": a_up, "a2": a_down, "b1": b_up, "b2": b_down},
            "old": {"a1": a_down, "a2": a_up, "b1": b_down, "b2": b_up},
        }
        for alpha in (None, 2.0, 0.0, -1.5):
            arrays = (array(tensor) for tensor in (a_down, a_up, b_down, b_up))
            changed = weight + glora.delta(weight, *arrays, alpha)
            for layout, tensors in layouts.items():
                name = f"glora {layout} {kind} alpha {alpha}"
                yield OnBase(name, "glora", {**tensors, **alpha_of(alpha)}, weight, changed)
    make = Maker(201)
    weight, core = array(make(6, 4, 3, 2)), make(3, 3, 3, 2)
    a1, a2, b1, b2 = make(4, 3, 1, 1), make(3, 4, 1, 1), make(6, 3, 1, 1), make(3, 4, 1, 1)
    a = glora.delta(weight, array(a2), array(a1), np.zeros((3, 4, 3, 2)), np.zeros((6, 3)), 1.5)
    b = lora.tucker(array(b2), array(core), array(b1), 1.5)
    tensors = {"a1": a1, "a2": a2, "b1": b1, "b2": b2, "bm": core, **alpha_of(1.5)}
    yield OnBase("glora tucker", "glora", tensors, weight, weight + a + b)


def glora_paper_cases() -> Iterator[OnBase]:
    for kind, shape, make, weight in _kinds():
        out, inner = shape[:2]
        width = weight[0].size
        a, b = (make(out, 3), make(3, width)), (make(out, 2), make(2, width))
        c = (make(inner, 2), make(2, 1))
        low = {
            **_low("A", *a),
            **_low("B", *b),
            **_low("C", *c),
            "glora_D.X": make(out),
            "glora_E.X": make(out),
        }
        yield _paper(f"low rank {kind}", low, weight, a[0] @ a[1], b[0] @ b[1], c[0] @ c[1])
        a_v, b_v, c_v = make(out, 1), make(out, 1), make(inner, 1)
        vector = {
            "glora_A.X": a_v,
            "glora_B.X": b_v,
            "glora_C.X": c_v,
            "glora_D.X": make(1),
            "glora_E.X": make(1),
        }
        yield _paper(f"vectors {kind}", vector, weight, a_v, b_v, c_v)
        a_n, b_n = make(1), make(1)
        number = {"glora_A.X": a_n, "glora_B.X": b_n}
        zeros = {"glora_C.zeros": torch.zeros(inner, 1), "glora_D.zeros": torch.zeros(out)}
        a_w, b_w = a_n.expand(out, 1), b_n.expand(out, 1)
        yield _paper(f"numbers {kind}", {**number, **zeros}, weight, a_w, b_w, None)
    yield from _forks_supernet()


def _low(letter: str, up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"glora_{letter}.Xd": up, f"glora_{letter}.Xu": down}


def _paper(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    weight: Array,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    c: torch.Tensor | None,
    facts: Mapping[str, Any] | None = None,
    d: torch.Tensor | None = None,
    e: torch.Tensor | None = None,
) -> OnBase:
    out = len(weight)
    bias = array(Maker(202)(out))
    flat = weight.reshape(out, -1)
    wide_a, wide_b = (np.zeros((1, 1)) if path is None else array(path) for path in (a, b))
    column = np.zeros(weight.shape[1]) if c is None else array(c).ravel()
    d = tensors.get("glora_D.X", d)
    e = tensors.get("glora_E.X", e)
    wide_d, wide_e = (np.zeros(1) if path is None else array(path) for path in (d, e))
    has_bias = c is not None or d is not None or e is not None
    changes = [
        glora_paper.bias_change(weight, old, column, wide_d, wide_e) if has_bias else None
        for old in (bias, None)
    ]
    changed = flat + glora_paper.weight_change(flat, wide_a, wide_b)
    return OnBase(
        f"glora-paper {name}",
        "glora-paper",
        tensors,
        weight,
        changed.reshape(weight.shape),
        bias=bias,
        bias_change=changes[0],
        no_bias_change=changes[1],
        facts=facts or {},
    )


def _forks_supernet() -> Iterator[OnBase]:
    make = Maker(203)
    weight = array(make(6, 8))
    ad, au, bd, bu = make(6, 4), make(4, 8), make(6, 4), make(4, 8)
    cd, cu, d, e = make(8, 4), make(4, 1), make(6), make(6)
    supernet = {
        "glora_Ad": ad,
        "glora_Au": au,
        "glora_Bd": bd,
        "glora_Bu": bu,
        "glora_Cd": cd,
        "glora_Cu": cu,
        "glora_D": d,
        "glora_E": e,
    }

    def chosen(*choices: str) -> dict[str, Any]:
        return {"eval_config": dict(zip("ABCDE", choices, strict=True))}

    low = chosen("LoRA_4", "LoRA_2", "LoRA_4", "vector", "vector")
    a, b, c = ad @ au, bd[:, :2] @ bu[:2], cd @ cu
    yield _paper("fork low rank", supernet, weight, a, b, c, low, d, e)
    other = chosen("vector", "constant", "vector", "constant", "none")
    b = bd[:1, :1].expand(6, 1)
    yield _paper("fork small", supernet, weight, ad[:, :1], b, cd[:, :1], other, d[:1], None)
    none = chosen("none", "LoRA_4", "none", "none", "constant")
    yield _paper("fork none", supernet, weight, None, bd @ bu, None, none, None, e[:1])


def oft_cases() -> Iterator[OnBase]:
    for kind, shape, make, weight in _kinds():
        out, ones = shape[0], [1] * (len(shape) - 2)
        blocks = make(out // 4, 4, 4)
        norm = float((blocks - blocks.mT).norm())
        for alpha in (None, 0.0, 0.5 * norm / out, 2 * norm / out):
            rotation = oft.lycoris_rotation(array(blocks), alpha)
            tensors = {"oft_blocks": blocks, **alpha_of(alpha)}
            changed = oft.rows_rotated(weight, rotation)
            yield OnBase(f"oft {kind} {alpha}", "oft", tensors, weight, changed, Needs.WHOLE)
        tensors = {"oft_blocks": blocks, "rescale": make(out, 1, *ones)}
        rotation = oft.lycoris_rotation(array(blocks), None)
        changed = oft.rows_rotated(weight, rotation, array(tensors["rescale"]))
        yield OnBase(f"oft rescale {kind}", "oft", tensors, weight, changed, Needs.WHOLE)
        for alpha in (0.0, 0.5 * norm / out, 2 * norm / out):
            rotation = oft.kohya_rotation(array(blocks), alpha)
            tensors = {"oft_blocks": blocks, **alpha_of(alpha)}
            changed = oft.rows_rotated(weight, rotation)
            name = f"oft-kohya {kind} {alpha}"
            yield OnBase(name, "oft-kohya", tensors, weight, changed, Needs.WHOLE)
        rotations = np.stack([oft.cayley(q) for q in array(blocks - blocks.mT)])
        changed = oft.rows_rotated(weight, oft.block_diagonal(list(rotations)))
        tensors = {"oft_diag": torch.from_numpy(rotations)}
        name = f"oft-legacy {kind}"
        yield OnBase(name, "oft-legacy", tensors, weight, changed, Needs.WHOLE)
        yield from _peft_oft(kind, make, weight)
    make = Maker(204)
    # Flux's fused qkv and mlp: four parts of which the last has other blocks.
    weight, parts = array(make(18, 8)), [make(2, 2, 2), make(2, 2, 2), make(2, 2, 2), make(2, 3, 3)]
    alpha = 0.3
    rotation = oft.block_diagonal([oft.kohya_rotation(array(part), alpha) for part in parts])
    tensors = {f"oft_blocks.{i}": part for i, part in enumerate(parts)} | alpha_of(alpha)
    changed = oft.rows_rotated(weight, rotation)
    yield OnBase("oft-kohya parts", "oft-kohya", tensors, weight, changed, Needs.WHOLE)
    first = {"oft_diag": 0.1 * make(3, 6, 6)}  # LyCORIS 1.9: R - I, and no rotation
    added = oft.block_diagonal([block + np.eye(6) for block in array(first["oft_diag"])])
    changed = oft.rows_rotated(weight, added)
    yield OnBase("oft-legacy of 1.9", "oft-legacy", first, weight, changed, Needs.WHOLE)


def _peft_oft(kind: str, make: Maker, weight: Array) -> Iterator[OnBase]:
    width = weight[0].size
    vectors = 0.3 * make(width // 4, 6)
    skew = [oft.triangle(vector, 4) for vector in array(vectors)]
    series = oft.block_diagonal([oft.five_terms(q) for q in skew])
    exact = oft.block_diagonal([oft.cayley(-q) for q in skew])
    name, tensors = f"oft-peft {kind}", {"oft_R": vectors}
    yield OnBase(name, "oft-peft", tensors, weight, oft.columns_rotated(weight, series))
    facts: dict[str, Any] = {"use_cayley_neumann": False}
    changed = oft.columns_rotated(weight, exact)
    yield OnBase(f"{name} exact", "oft-peft", tensors, weight, changed, facts=facts)
    scaled = {**tensors, "oft_R": vectors, "scaled_oft": torch.tensor(True)}
    smaller = [oft.five_terms(q / (2 * np.sqrt(3))) for q in skew]
    changed = oft.columns_rotated(weight, oft.block_diagonal(smaller))
    yield OnBase(f"{name} scaled", "oft-peft", scaled, weight, changed)
    shared = oft.block_diagonal([oft.five_terms(skew[0])] * (width // 4))
    changed = oft.columns_rotated(weight, shared)
    one = {"oft_R": vectors[:1]}
    facts = {"block_share": True}
    yield OnBase(f"{name} shared", "oft-peft", one, weight, changed, facts=facts)
    if weight.ndim == 2:
        changed = oft.columns_rotated(weight, series.T)
        table = {"oft_embedding_R": vectors}
        yield OnBase(f"{name} embedding", "oft-peft", table, weight, changed)
        limit = 0.8 / np.sqrt(len(skew))
        held = [q * min(1, limit / np.sqrt(np.sum(q**2))) for q in skew]
        changed = oft.columns_rotated(weight, oft.block_diagonal([oft.five_terms(q) for q in held]))
        facts = {"coft_eps": 0.8}
        yield OnBase(f"{name} coft", "oft-peft", tensors, weight, changed, facts=facts)


def boft_cases() -> Iterator[OnBase]:
    for kind, shape, make, weight in _kinds():
        out, ones, width = shape[0], [1] * (len(shape) - 2), weight[0].size
        blocks = make(2, out // 4, 4, 4) if out % 8 == 0 else make(2, out // 2, 2, 2)
        q = array(blocks - blocks.mT)
        rotations = np.array([[oft.cayley(block) for block in stage] for stage in q])
        rescale = make(out, 1, *ones)
        for extra in ({}, {"rescale": rescale}):
            factor = array(rescale) if extra else None
            changed = boft.lycoris(weight, rotations, factor)
            tensors = {"oft_blocks": blocks, **extra}
            name = f"boft {kind} {' '.join(extra)}"
            yield OnBase(name, "boft", tensors, weight, changed, Needs.WHOLE)
        norm = float(np.sqrt(np.sum(q**2))) + 1e-8
        half = np.array([[oft.cayley(block / 2) for block in stage] for stage in q])
        tensors = {"oft_blocks": blocks, **alpha_of(norm / 2 / out)}
        changed = boft.lycoris(weight, half)
        yield OnBase(f"boft clamped {kind}", "boft", tensors, weight, changed, Needs.WHOLE)
        tensors = {"oft_diag": torch.from_numpy(rotations)}
        changed = boft.lycoris(weight, rotations)
        yield OnBase(f"boft-legacy {kind}", "boft-legacy", tensors, weight, changed, Needs.WHOLE)
        size = 4 if width % 8 == 0 else 2
        stored = make(2, width // size, size, size)
        factor = make(out, 1) if len(shape) == 2 else make(1, out)
        for stages in (stored, stored[:1]):
            changed = boft.peft(weight, array(stages), array(factor))
            tensors = {"boft_R": stages, "boft_s": factor}
            yield OnBase(f"boft-peft {kind} {len(stages)}", "boft-peft", tensors, weight, changed)
    make = Maker(205)
    weight, deep = array(make(16, 8)), make(4, 8, 2, 2)
    q = array(deep - deep.mT)
    rotations = np.array([[oft.cayley(block) for block in stage] for stage in q])
    changed = boft.lycoris(weight, rotations)
    yield OnBase("boft deep", "boft", {"oft_blocks": deep}, weight, changed, Needs.WHOLE)
    weight, factor, deep = array(make(6, 16)), make(6, 1), make(3, 4, 4, 4)
    changed = boft.peft(weight, array(deep), array(factor))
    yield OnBase("boft-peft deep", "boft-peft", {"boft_R": deep, "boft_s": factor}, weight, changed)


def ia3_cases() -> Iterator[OnBase]:
    for kind, shape, make, weight in _kinds():
        out, inner, *kernel = shape
        ones = [1] * len(kernel)
        row, column, bias = make(out), make(inner), array(make(out))
        for side, offset, changed in (
            (0, row, ia3.rows(weight, 1 + array(row))),
            (1, column, ia3.channels(weight, 1 + array(column))),
        ):
            on_input = torch.tensor(side)
            forms = [offset, offset.reshape(1, -1, *ones)]
            for form in forms if kernel else [*forms, offset.reshape(-1, 1)]:
                tensors = {"weight": form, "on_input": on_input}
                name = f"ia3 {kind} {side} {tuple(form.shape)}"
                yield OnBase(name, "ia3", tensors, weight, changed, bias=bias)
        facts = {"is_feedforward": False}
        stored = row.reshape(1, out, *ones) if kernel else row.reshape(out, 1)
        by_rows = {
            "tensors": {"ia3_l": stored},
            "changed": ia3.rows(weight, array(row)),
            "bias": bias,
            "bias_change": bias * array(row) - bias,
        }
        named, said = {"layout": "ia3-peft", "weight": weight}, out == inner and bool(kernel)
        yield OnBase(f"ia3-peft rows {kind}", **named, **by_rows, facts=facts)
        stored = column.reshape(1, inner, *ones)
        by_channels = {
            "tensors": {"ia3_l": stored},
            "changed": ia3.channels(weight, array(column)),
            "bias": bias,
        }
        facts = {"is_feedforward": True}
        yield OnBase(f"ia3-peft channels {kind}", **named, **by_channels, facts=facts)
        if not said:
            yield OnBase(f"ia3-peft rows by shape {kind}", **named, **by_rows)
            yield OnBase(f"ia3-peft channels by shape {kind}", **named, **by_channels)


def hra_cases() -> Iterator[OnBase]:
    for kind, _, make, weight in _kinds():
        columns = make(weight[0].size, 3)
        tensors = {"hra_u": columns}
        changed = hra.reflected(weight, array(columns))
        yield OnBase(f"hra {kind}", "hra", tensors, weight, changed)
        facts = {"is_gram_schmidt": True}
        changed = hra.reflected(weight, hra.orthonormal(array(columns)))
        yield OnBase(f"hra orthonormal {kind}", "hra", tensors, weight, changed, facts=facts)
    make = Maker(206)
    weight, half = array(make(6, 8)), make(8, 2)
    pairs = {"hra_u": half.repeat_interleave(2, 1)}  # as PEFT starts: every reflection is undone
    yield OnBase("hra untrained", "hra", pairs, weight, weight.copy())


def hira_cases() -> Iterator[OnBase]:
    for kind, (out, inner, *kernel), make, weight in _kinds():
        down, up = make(3, inner, *kernel), make(out, 3, *[1] * len(kernel))
        changed = hira.changed(weight, array(down), array(up))
        tensors = {"hira_A": down, "hira_B": up}
        yield OnBase(f"hira {kind}", "hira", tensors, weight, changed)
    make = Maker(207)
    table, down, up = array(make(10, 4)), make(2, 10), make(4, 2)
    changed = hira.changed(table.T.copy(), array(down), array(up)).T
    tensors = {"hira_embedding_A": down, "hira_embedding_B": up}
    yield OnBase("hira of an embedding", "hira", tensors, table, changed)


ON_BASE = [
    *dora_cases(),
    *glora_cases(),
    *glora_paper_cases(),
    *oft_cases(),
    *boft_cases(),
    *ia3_cases(),
    *hra_cases(),
    *hira_cases(),
]
