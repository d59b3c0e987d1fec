"""Tensors that a bake adds to a language model because its own code can load them, and how its
configuration and index then say so.

- An output layer that was the embedding itself (tied) and is no longer the same.
- Biases, where the model's class has a switch for them: then all layers of the switch get one.
Everything else that would need a new tensor is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from merge.bases import Base, Slice
from merge.formats.header import DTYPE_BITS, TensorInfo

HEAD = "lm_head"
_CONFIG = "config.json"
_EMBEDDINGS = ("embed_tokens", "wte")
# Classes whose config has the switch, each checked against transformers 5.14 in the tests.
_SWITCHES: Mapping[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "attention_bias": (
        frozenset({"llama", "qwen3", "gemma", "gemma2", "granite"}),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ),
    "mlp_bias": (
        frozenset({"llama", "granite"}),
        ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ),
}


@dataclass(frozen=True, slots=True)
class Added:
    """A tensor that the base lacks: a copy of `source`, or zeros, before any patch."""

    dtype: str
    shape: tuple[int, ...]
    source: str | None


class Additions:
    """What one bake adds. `tensors`: file -> key -> tensor; `config` are fields that change."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self.tensors: dict[str, dict[str, Added]] = {}
        self.config: dict[str, Any] = {}

    def head(self, module: str) -> Slice | None:
        """The output layer of a tied model, as a tensor of its own; None if `module` is another."""
        if _last(module) != HEAD:
            return None
        return self._untie()

    def keep_head(self, module: str) -> None:
        """Where `module` is the embedding of a tied model, keep the output layer as it was."""
        if _last(module) in _EMBEDDINGS:
            self._untie()

    def copy_of(self, module: str) -> Slice | None:
        """The output layer that was added as a copy of `module`, the embedding; None without one."""
        found = self._base.find_key(module, "weight")
        if found is None:
            return None
        file, key = found
        added = self.tensors.get(file, {}).get(f"{HEAD}.weight")
        if added is None or added.source != key:
            return None
        return Slice(file, f"{HEAD}.weight", 0, added.shape[0], added.shape[1])

    def bias(self, module: str) -> Slice | None:
        """A bias for a layer whose class has a switch for it, of zeros; None for all others."""
        kind = self._base.config.get("model_type")
        for switch, (kinds, ends) in _SWITCHES.items():
            if kind in kinds and module.endswith(ends) and not self._base.config.get(switch):
                self._switch_on(switch, ends)
                found = self._base.find_key(module, "weight")
                assert found is not None, f"{module} is in the base"
                file, key = found
                name = key.removesuffix(".weight") + ".bias"
                return Slice(file, name, 0, self.tensors[file][name].shape[0], 1)
        return None

    def texts(self) -> dict[str, bytes]:
        """The configuration and the shards' index as they must become; nothing if nothing is added."""
        if not self.tensors:
            return {}
        found = {_CONFIG: _json(dict(self._base.config) | self.config)}
        index = next((name for name in self._base.others if name.endswith(".index.json")), None)
        if index is not None:
            found[index] = _json(self._extended(json.loads(self._base.text(index))))
        return found

    @property
    def size_bytes(self) -> int:
        """Of all tensors together."""
        return sum(
            prod(added.shape) * DTYPE_BITS[added.dtype] // 8
            for tensors in self.tensors.values()
            for added in tensors.values()
        )

    def _untie(self) -> Slice | None:
        """The embedding once more, under the name of the output layer."""
        if not self._base.config or self._base.find_key(HEAD, "weight") is not None:
            return None
        kinds = self._base.config.get("architectures") or []
        is_headed = any(str(kind).endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds)
        found = next(
            (f for name in _EMBEDDINGS if (f := self._base.find_key(name, "weight"))), None
        )
        if not is_headed or found is None:
            return None
        file, key = found
        info = self._info(file, key)
        self._add(file, f"{HEAD}.weight", Added(info.dtype, info.shape, key))
        self.config["tie_word_embeddings"] = False
        return Slice(file, f"{HEAD}.weight", 0, info.shape[0], info.shape[1])

    def _switch_on(self, switch: str, ends: tuple[str, ...]) -> None:
        self.config[switch] = True
        for file, held in self._base.files.items():
            for key, info in held.header.tensors.items():
                stem = key.removesuffix(".weight")
                if stem != key and stem.endswith(ends):
                    self._add(file, f"{stem}.bias", Added(info.dtype, info.shape[:1], None))

    def _add(self, file: str, key: str, added: Added) -> None:
        self.tensors.setdefault(file, {}).setdefault(key, added)

    def _info(self, file: str, key: str) -> TensorInfo:
        return self._base.files[file].header.tensors[key]

    def _extended(self, index: dict[str, Any]) -> dict[str, Any]:
        weight_map = dict(index["weight_map"])
        for file, tensors in self.tensors.items():
            weight_map |= dict.fromkeys(tensors, file)
        metadata = dict(index.get("metadata") or {})
        if isinstance(metadata.get("total_size"), int):
            metadata["total_size"] += self.size_bytes
        return index | {"metadata": metadata, "weight_map": weight_map}


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
