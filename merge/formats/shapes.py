"""What the shapes of a module's factors say about the weight they change, for every layout. No torch.

Some layouts show the whole weight, some one side of it: then the other side is None and the base in
hand decides. ValueError says in one clause which factors do not fit each other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt, prod

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Dims:
    """`inner` is in * kernel; `kernel` is None where the factors do not show it.

    `rank` is the stored inner dimension; `exact_rank` is that of the change as a product that needs
    no base, None where there is none. `is_vector` says that the parameter is one-dimensional.
    """

    out: int | None
    inner: int | None
    kernel: Shape | None = None
    rank: int | None = None
    exact_rank: int | None = None
    is_vector: bool = False

    @property
    def extent(self) -> tuple[int, int] | None:
        """(out, in * kernel): the change as a matrix; None where the factors leave a side open."""
        return None if self.out is None or self.inner is None else (self.out, self.inner)

    @property
    def shape(self) -> Shape:
        """The weight's shape as far as the factors show it, with 0 for a side that they do not."""
        if self.is_vector:
            return (self.out or 0,)
        kernel = self.kernel or ()
        return self.out or 0, (self.inner or 0) // prod(kernel), *kernel

    @property
    def is_shown(self) -> bool:
        """Whether the factors show any side of the weight."""
        return self.out is not None or self.inner is not None

    def fits(self, shape: Shape) -> bool:
        """Whether the change has as many elements, in the same order, as a weight of `shape`.

        A 1x1 convolution and a linear layer hold the same numbers: SD 1's proj_in is the one,
        SD 2's the other.
        """
        if self.out is not None and self.out != shape[0]:
            return False
        if self.inner is not None and self.inner != prod(shape[1:]):
            return False
        return self.kernel is None or self.kernel == shape[2:] or _is_one(self.kernel, shape[2:])


def _is_one(kernel: Shape, other: Shape) -> bool:
    return prod(kernel) == prod(other) == 1


def measure(layout: str, shapes: Shapes) -> Dims:
    """The dimensions that the factors of one module show; ValueError where they do not fit."""
    for role, shape in shapes.items():
        if 0 in shape:
            raise ValueError(f"{role} is an empty factor; training saved it without gathering")
    for role in ("alpha", "scale", "scalar", "ranknum", "on_input", "scaled_oft"):
        is_replaced = role == "scale" and layout == "replacement"
        if role in shapes and not is_replaced and prod(shapes[role]) != 1:
            raise ValueError(f"{role} is {list(shapes[role])} and not one number")
    dims = _RULES[layout](shapes)
    if "dora_scale" in shapes:
        _check_magnitude(shapes["dora_scale"], dims)
        return Dims(dims.out, dims.inner, dims.kernel, dims.rank)
    return dims


def is_on_input(magnitude: Shape, dims: Dims) -> bool:
    """Whether DoRA's magnitudes are one per input channel, (1, in), and not one per row of outputs.

    Rows are (out, 1) and (out,), and (1, out, 1, 1) from PEFT for a convolution with out != in.
    """
    n = prod(magnitude)
    if len(magnitude) > 1 and magnitude[0] == 1 and magnitude[1] == n:
        return n == dims.shape[1] or n != dims.out
    return len(magnitude) == 1 and n != dims.out


def _check_magnitude(magnitude: Shape, dims: Dims) -> None:
    n = prod(magnitude)
    if max(magnitude, default=1) != n:
        raise ValueError(f"dora_scale is {magnitude}, which is no vector")
    if n not in (dims.out, dims.inner) and not _is_per_channel(n, dims):
        raise ValueError(f"dora_scale has {n} values for a weight of {dims.shape}")


def _is_per_channel(n: int, dims: Dims) -> bool:
    return dims.inner is not None and bool(dims.kernel) and n == dims.shape[1]


def _matrix(shapes: Shapes, role: str, least: int = 2) -> Shape:
    shape = shapes[role]
    if len(shape) < least:
        raise ValueError(f"{role} is {shape}, which is no matrix")
    return shape


def _lora(shapes: Shapes) -> Dims:
    down, up = _matrix(shapes, "down"), _matrix(shapes, "up")
    if up[1] != down[0]:
        raise ValueError(f"up has rank {up[1]} and down has rank {down[0]}")
    if any(n != 1 for n in up[2:]):
        raise ValueError(f"up is {up}; the kernel belongs to down")
    kernel = down[2:]
    if "mid" in shapes:
        mid = _matrix(shapes, "mid", 3)
        if mid[0] != up[1] or mid[1] != down[0] or prod(kernel) != 1:
            raise ValueError(f"mid is {mid} between down {down} and up {up}")
        kernel = mid[2:]
    if "up_bias" in shapes and shapes["up_bias"] != (up[0],):
        raise ValueError(f"the bias of up is {shapes['up_bias']} and up is {up}")
    rank = down[0]
    exact = None if "bias_indices" in shapes else rank
    return Dims(up[0], down[1] * prod(kernel), kernel, rank, exact)


def _adalora(shapes: Shapes) -> Dims:
    dims = _lora(shapes)
    if prod(shapes["lora_E"]) != dims.rank:
        raise ValueError(f"lora_E is {shapes['lora_E']} and the rank is {dims.rank}")
    # PEFT flattens the kernel of a convolution here.
    return Dims(dims.out, dims.inner, None, dims.rank, dims.rank)


def _embedding(shapes: Shapes) -> Dims:
    """PEFT stores an embedding's factors the other way round: (rank, words) and (width, rank)."""
    down, up = _matrix(shapes, "embedding_down"), _matrix(shapes, "embedding_up")
    if up[1] != down[0]:
        raise ValueError(f"embedding_up has rank {up[1]} and embedding_down has rank {down[0]}")
    return Dims(down[1], up[0], (), down[0], down[0])


def _mlx(shapes: Shapes) -> Dims:
    """MLX multiplies from the right: (in, rank) and (rank, out)."""
    down, up = _matrix(shapes, "mlx_down"), _matrix(shapes, "mlx_up")
    if len(down) == len(up) == 3:  # (experts, rank, in) and (experts, out, rank)
        if (down[0], down[1]) != (up[0], up[2]):
            raise ValueError(f"lora_a is {down} and lora_b is {up}")
        return Dims(down[0], up[1] * down[2], (down[2],), down[1])
    if down[1] != up[0]:
        raise ValueError(f"lora_b has rank {up[0]} and lora_a has rank {down[1]}")
    return Dims(up[1], down[0], (), up[0], up[0])


def _torchtune(shapes: Shapes) -> Dims:
    return _lora({"down": shapes["torchtune_down"], "up": shapes["torchtune_up"]})


def _experts(shapes: Shapes) -> Dims:
    """PEFT's target_parameters: (experts * rank, in) and (out, experts * rank)."""
    dims = _lora(shapes)
    return Dims(dims.out, dims.inner, None, dims.rank)


def _loha(shapes: Shapes) -> Dims:
    sides = [_loha_side(shapes, n) for n in (1, 2)]
    if sides[0][:2] != sides[1][:2]:
        raise ValueError(f"its two products are {sides[0][:2]} and {sides[1][:2]}")
    (out, inner, rank, kernel), (*_, other, _) = sides
    return Dims(out, inner, kernel, rank, rank * other)


def _loha_side(shapes: Shapes, n: int) -> tuple[int, int, int, Shape | None]:
    a, b = _matrix(shapes, f"hada_w{n}_a"), _matrix(shapes, f"hada_w{n}_b")
    core = shapes.get(f"hada_t{n}")
    if core is None:
        if a[1] != b[0]:
            raise ValueError(f"hada_w{n}_a has rank {a[1]} and hada_w{n}_b has rank {b[0]}")
        return a[0], prod(b[1:]), b[0], b[2:] or None
    if len(core) < 3 or core[0] != a[0] or core[1] != b[0]:
        raise ValueError(f"hada_t{n} is {core} between {a} and {b}")
    return a[1], b[1] * prod(core[2:]), b[0], core[2:]


def _lokr(shapes: Shapes) -> Dims:
    left, left_rank, _ = _lokr_side(shapes, 1)
    right, right_rank, kernel = _lokr_side(shapes, 2)
    exact = None
    if left_rank and right_rank:
        exact = left_rank * right_rank
    elif left_rank or right_rank:
        full = left if right_rank else right
        exact = (left_rank or right_rank or 0) * min(full)
    rank = right_rank or left_rank
    return Dims(left[0] * right[0], left[1] * right[1], kernel, rank, exact)


def _lokr_side(shapes: Shapes, n: int) -> tuple[tuple[int, int], int | None, Shape | None]:
    """(rows, columns) of one factor of the Kronecker product, its rank, and the kernel it shows."""
    full = shapes.get(f"lokr_w{n}")
    if full is not None:
        full = _matrix(shapes, f"lokr_w{n}")
        return (full[0], prod(full[1:])), None, full[2:] or None
    a, b = _matrix(shapes, f"lokr_w{n}_a"), _matrix(shapes, f"lokr_w{n}_b")
    core = shapes.get(f"lokr_t{n}")
    if core is not None:
        if len(core) < 3 or core[0] != a[0] or core[1] != b[0]:
            raise ValueError(f"lokr_t{n} is {core} between {a} and {b}")
        return (a[1], b[1] * prod(core[2:])), b[0], core[2:]
    if a[1] != b[0]:
        raise ValueError(f"lokr_w{n}_a has rank {a[1]} and lokr_w{n}_b has rank {b[0]}")
    return (a[0], prod(b[1:])), b[0], b[2:] or None


def _vera(shapes: Shapes) -> Dims:
    out, rank = prod(shapes["vera_lambda_b"]), prod(shapes["vera_lambda_d"])
    down, up = _matrix(shapes, "vera_A"), _matrix(shapes, "vera_B")
    if down[0] != rank or up[1] != rank or up[0] < out:
        raise ValueError(f"vera_A {down} and vera_B {up} do not hold {rank} ranks and {out} rows")
    return Dims(out, None, (), rank, rank)


def _glora(shapes: Shapes) -> Dims:
    """Two generations share the names: a1 is (in, rank) today and was (rank, in).

    For a square weight both readings hold, one of them with the layer's width as its rank: the
    smaller rank is meant.
    """
    a1, a2, b1, b2 = (_matrix(shapes, role) for role in ("a1", "a2", "b1", "b2"))
    readings = []
    if b2[0] == b1[1] == a1[1] == a2[0] and a1[0] == a2[1] == b2[1]:
        kernel = shapes["bm"][2:] if "bm" in shapes else b2[2:]
        readings.append(Dims(b1[0], b2[1] * prod(kernel), kernel, a2[0]))
    if b2[1] == b1[0] == a1[0] == a2[1] and a1[1] == a2[0] == b1[1]:
        readings.append(Dims(b2[0], prod(b1[1:]), b1[2:], a1[0]))
    if not readings:
        raise ValueError(f"a1 {a1}, a2 {a2}, b1 {b1} and b2 {b2} share no rank")
    return min(readings, key=lambda dims: dims.rank or 0)


def _glora_paper(shapes: Shapes) -> Dims:
    """A and B are (out, rank) and (rank, in) or vectors (out, 1); D and E are of outputs.

    The first of the sides that are shown is taken; merge.algorithms compares them with the weight.
    """
    outs: list[int] = []
    inners: list[int] = []
    ranks: list[int] = []
    for role, shape in shapes.items():
        letter, part = role[len("glora_")], role[len("glora_") + 1 :].lstrip(".").lower()
        if letter == "C" or prod(shape) == 1:
            continue
        if part.endswith("u"):
            inners.append(shape[-1])
        else:
            outs.append(shape[0])
            ranks += shape[1:2] if part.endswith("d") and len(shape) == 2 else ()
    out, inner, rank = (next(iter(found), None) for found in (outs, inners, ranks))
    return Dims(out, inner, None, rank)


def _oft(shapes: Shapes) -> Dims:
    """LyCORIS and kohya turn blocks of output rows: (blocks, size, size)."""
    blocks = shapes["oft_blocks"]
    if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2]:
        raise ValueError(f"oft_blocks is {blocks}, which is no list of square blocks")
    out = blocks[-3] * blocks[-1]
    if "rescale" in shapes and prod(shapes["rescale"]) != out:
        raise ValueError(f"rescale is {shapes['rescale']} and the blocks make {out} rows")
    return Dims(out, None)


def _oft_kohya(shapes: Shapes) -> Dims:
    if "alpha" not in shapes:
        raise ValueError("kohya's OFT without alpha, which is the limit of its rotations")
    blocks = [shape for role, shape in shapes.items() if role.startswith("oft_blocks")]
    return Dims(sum(_oft({"oft_blocks": shape}).out or 0 for shape in blocks), None)


def _oft_legacy(shapes: Shapes) -> Dims:
    return _oft({"oft_blocks": shapes["oft_diag"]})


def _oft_peft(shapes: Shapes) -> Dims:
    """PEFT turns blocks of inputs: (blocks, size * (size - 1) / 2); one block may serve for all."""
    role = "oft_R" if "oft_R" in shapes else "oft_embedding_R"
    vectors = _matrix(shapes, role)
    size = block_size(vectors[1])
    return Dims(None, None if vectors[0] == 1 else vectors[0] * size)


def block_size(n_entries: int) -> int:
    """The size of the square block whose strictly upper triangle has so many entries."""
    size = (1 + isqrt(1 + 8 * n_entries)) // 2
    if size * (size - 1) // 2 != n_entries:
        raise ValueError(f"oft_R has {n_entries} entries per block, which make no triangle")
    return size


def _boft_peft(shapes: Shapes) -> Dims:
    blocks = shapes["boft_R"]
    if len(blocks) != 4 or blocks[2] != blocks[3]:
        raise ValueError(f"boft_R is {blocks}, which is no list of square blocks")
    return Dims(prod(shapes["boft_s"]), blocks[1] * blocks[2])


def _ia3(shapes: Shapes) -> Dims:
    # Which side is scaled is a value (on_input), not a shape, unless the vector is stored as one.
    shape = shapes["weight"]
    if prod(shape) != max(shape, default=1):
        raise ValueError(f"weight is {shape}, which is no vector")
    return Dims(None, None)


def _ia3_peft(shapes: Shapes) -> Dims:
    shape = shapes["ia3_l"]
    if prod(shape) != max(shape, default=1):
        raise ValueError(f"ia3_l is {shape}, which is no vector")
    if len(shape) == 2:
        return Dims(shape[0], None) if shape[1] == 1 else Dims(None, shape[1])
    return Dims(None, None)


def _hra(shapes: Shapes) -> Dims:
    inner, rank = _matrix(shapes, "hra_u")[:2]
    return Dims(None, inner, None, rank)


def _hira(shapes: Shapes) -> Dims:
    if "hira_A" not in shapes:
        down, up = shapes["hira_embedding_A"], shapes["hira_embedding_B"]
        dims = _embedding({"embedding_down": down, "embedding_up": up})
    else:
        dims = _lora({"down": shapes["hira_A"], "up": shapes["hira_B"]})
    return Dims(dims.out, dims.inner, dims.kernel, dims.rank)


def _full(shapes: Shapes) -> Dims:
    return _stored(shapes, "diff", "diff_b")


def _norm(shapes: Shapes) -> Dims:
    return _stored(shapes, "w_norm", "b_norm")


def _replacement(shapes: Shapes) -> Dims:
    role = next((r for r in ("set_weight", "scale", "ln_tuning_weight") if r in shapes), "weight")
    return _stored(shapes, role, "ln_tuning_bias" if "ln_tuning_bias" in shapes else "bias")


def _stored(shapes: Shapes, weight: str, bias: str) -> Dims:
    """Tensors in the shape of the parameters that they change."""
    if len(shapes.get(bias, ())) > 1:
        raise ValueError(
            f"{bias} is {shapes[bias]}: old extractions store a residual so, unread here"
        )
    if weight in shapes and bias in shapes and shapes[bias] != shapes[weight][:1]:
        raise ValueError(f"{weight} is {shapes[weight]} and {bias} is {shapes[bias]}")
    if weight not in shapes:
        return Dims(prod(shapes[bias]), None, exact_rank=0)
    shape = shapes[weight]
    if len(shape) < 2:
        return Dims(prod(shape), 1, (), is_vector=True)
    return Dims(shape[0], prod(shape[1:]), shape[2:])


def _tokens(shapes: Shapes) -> Dims:
    return Dims(None, _matrix(shapes, "trainable_tokens_delta")[1], ())


_RULES: Mapping[str, Callable[[Shapes], Dims]] = {
    "lora": _lora,
    "lora-mha": _lora,
    "lora-experts": _experts,
    "lora-embedding": _embedding,
    "lora-mlx": _mlx,
    "lora-torchtune": _torchtune,
    "adalora": _adalora,
    "loha": _loha,
    "lokr": _lokr,
    "vera": _vera,
    "glora": _glora,
    "glora-paper": _glora_paper,
    "oft": _oft,
    "boft": _oft,
    "oft-kohya": _oft_kohya,
    "oft-legacy": _oft_legacy,
    "boft-legacy": _oft_legacy,
    "oft-peft": _oft_peft,
    "boft-peft": _boft_peft,
    "ia3": _ia3,
    "ia3-peft": _ia3_peft,
    "hra": _hra,
    "hira": _hira,
    "full": _full,
    "norm": _norm,
    "replacement": _replacement,
    "tokens": _tokens,
}
