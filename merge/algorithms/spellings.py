"""LoRA factors that are stored otherwise than `down` before `up`; all come down to LowRank.

- lora-mlx (mlx-lm): lora_a (in, rank), lora_b (rank, out), both transposed. The scale c itself is in
  adapter_config.json.
- lora-torchtune: lora_a (rank, in), lora_b (out, rank), with alpha / rank from the recipe. The query
  and key rows of Llama-like models pair neighbours for rotary embeddings where Hugging Face pairs
  halves, so their rows are reordered: torchtune's tune_to_peft_adapter_weights (BSD-3-Clause).
- lora-embedding (PEFT): A (rank, vocab), B (dim, rank); the table (vocab, dim) changes by c (B A)^T.
- adalora: Zhang et al. 2023, arXiv:2303.10512, eq. 3: P diag(lambda) Q, as up @ (lora_E * down).
  PEFT's scale is lora_alpha / (init_r + 1e-5): init_r and not the rank that was left after pruning.
- vera: Kopiczko et al. 2024, arXiv:2310.11454, eq. 2: diag(b) B diag(d) A, with A and B shared by all
  layers and cut to the size of each. No alpha.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change
from merge.algorithms.lowrank import extent, low_rank
from merge.algorithms.scale import one_number, scale_of, stated_scale

MLX_ROLES = "mlx_down mlx_up"
TORCHTUNE_ROLES = "torchtune_down torchtune_up alpha"
EMBEDDING_ROLES = "embedding_down embedding_up alpha"
ADALORA_ROLES = "down up lora_E ranknum alpha"
VERA_ROLES = "vera_lambda_b vera_lambda_d vera_A vera_B"


def read_mlx(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> Change:
    scale = stated_scale("lora-mlx", facts)
    return low_rank(tensors["mlx_up"].mT, tensors["mlx_down"].mT, scale, shape)


def read_torchtune(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> Change:
    if "alpha" in tensors:
        scale = scale_of(tensors, tensors["torchtune_down"].shape[0], facts)
    else:
        scale = stated_scale("lora-torchtune", facts)
    up = rows_in_halves(tensors["torchtune_up"], facts)
    return low_rank(up, tensors["torchtune_down"], scale, shape)


def rows_in_halves(
    up: Float[Tensor, "out *rest"], facts: Mapping[str, Any]
) -> Float[Tensor, "out *rest"]:
    """Rows of torchtune's query and key projections in the order of Hugging Face's.

    facts["rope_heads"] is the number of heads of this projection, 0 where rows keep their order.
    """
    if "rope_heads" not in facts:
        raise ValueError(
            "torchtune orders the rows of queries and keys by head; how many heads is not said"
        )
    heads = int(facts["rope_heads"])
    if heads == 0:
        return up
    if up.shape[0] % (2 * heads):
        raise ValueError(f"{up.shape[0]} rows are no {heads} heads of pairs")
    pairs = up.reshape(heads, -1, 2, *up.shape[1:])
    return pairs.transpose(1, 2).reshape(up.shape)


def read_embedding(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> Change:
    down, up = tensors["embedding_down"], tensors["embedding_up"]
    return low_rank(down.mT, up.mT, scale_of(tensors, down.shape[0], facts), shape)


def read_adalora(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> Change:
    down, values = tensors["down"], tensors["lora_E"]
    if values.numel() != down.shape[0]:
        raise ValueError(f"lora_E holds {values.numel()} values for rank {down.shape[0]}")
    if "scale" not in facts and {"alpha", "ranknum"} <= tensors.keys():
        scale = one_number(tensors, "alpha") / (one_number(tensors, "ranknum") + 1e-5)
    else:
        scale = stated_scale("adalora", facts)
    return low_rank(tensors["up"], values.reshape(-1, 1) * down.flatten(1), scale, shape)


def read_vera(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> Change:
    b, d = tensors["vera_lambda_b"].flatten(), tensors["vera_lambda_d"].flatten()
    up, down = tensors["vera_B"], tensors["vera_A"]
    inner = extent(shape)[1]
    if up.shape[0] < len(b) or down.shape[1] < inner or down.shape[0] != len(d):
        raise ValueError(
            f"shared A {tuple(down.shape)} and B {tuple(up.shape)} are too small for "
            f"rank {len(d)} and a base weight of {shape}"
        )
    return low_rank(b[:, None] * up[: len(b)], d[:, None] * down[:, :inner], 1.0, shape)
