"""Adapter algorithms: the mathematics of each, one file per algorithm.

To add one: its row in merge.formats.grammar, its module here, its row below, its oracle in
tests/oracles, its page in docs/formats.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from merge.algorithms import (
    boft,
    dora,
    experts,
    full,
    glora,
    glora_paper,
    hira,
    hra,
    ia3,
    locon,
    loha,
    lokr,
    oft,
    replacement,
    spellings,
)
from merge.algorithms.change import Change

Read = Callable[[Mapping[str, Tensor], tuple[int, ...], Mapping[str, Any]], Change]

# By layout: how it is read, and the roles that reader knows. A role it does not know is refused.
LAYOUTS: dict[str, tuple[Read, str]] = {
    "lora": (locon.read, locon.ROLES),
    "lora-mha": (locon.read, locon.ROLES),
    "lora-mlx": (spellings.read_mlx, spellings.MLX_ROLES),
    "lora-torchtune": (spellings.read_torchtune, spellings.TORCHTUNE_ROLES),
    "lora-embedding": (spellings.read_embedding, spellings.EMBEDDING_ROLES),
    "lora-experts": (experts.read, experts.ROLES),
    "adalora": (spellings.read_adalora, spellings.ADALORA_ROLES),
    "vera": (spellings.read_vera, spellings.VERA_ROLES),
    "loha": (loha.read, loha.ROLES),
    "lokr": (lokr.read, lokr.ROLES),
    "full": (full.read_full, full.FULL_ROLES),
    "norm": (full.read_norm, full.NORM_ROLES),
    "replacement": (replacement.read, replacement.ROLES),
    "tokens": (replacement.read_tokens, replacement.TOKENS_ROLES),
    # f(W) depends on W. DoRA wraps any layout, see read_change.
    "glora": (glora.read, glora.ROLES),
    "glora-paper": (glora_paper.read, glora_paper.ROLES),
    "oft": (oft.read, oft.ROLES),
    "oft-kohya": (oft.read_kohya, oft.KOHYA_ROLES),
    "oft-legacy": (oft.read_legacy, oft.LEGACY_ROLES),
    "oft-peft": (oft.read_peft, oft.PEFT_ROLES),
    "boft": (boft.read, boft.ROLES),
    "boft-legacy": (boft.read_legacy, boft.LEGACY_ROLES),
    "boft-peft": (boft.read_peft, boft.PEFT_ROLES),
    "ia3": (ia3.read, ia3.ROLES),
    "ia3-peft": (ia3.read_peft, ia3.PEFT_ROLES),
    "hra": (hra.read, hra.ROLES),
    "hira": (hira.read, hira.ROLES),
}


def read_change(
    layout: str,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    facts: Mapping[str, Any],
) -> Change:
    """What the factors of one layer do to its weight, of `shape` (out, in, *kernel), and its bias.

    `tensors` are by role and in the dtype of computation; `facts` is what only a configuration or
    the metadata says. ValueError, in one sentence, for factors that do not fit.
    """
    read, roles = LAYOUTS[layout]
    if unknown := sorted(tensors.keys() - set(roles.split()) - {dora.ROLE}):
        raise ValueError(f"{layout} factors with {', '.join(unknown)}, which it does not have")
    if dora.ROLE not in tensors:
        return read(tensors, shape, facts)
    inner = {role: tensor for role, tensor in tensors.items() if role != dora.ROLE}
    magnitudes = tensors[dora.ROLE]
    if layout == "lora-torchtune":
        magnitudes = spellings.rows_in_halves(magnitudes, facts)
    return dora.wrap(read(inner, shape, facts), magnitudes, shape, facts)
