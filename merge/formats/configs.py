"""What a configuration says about an adapter and its tensors do not: adapter_config.json of PEFT and
MLX, or diffusers' copy of PEFT's in the metadata.

A configuration may also say that a file means more than its tensors show; that is refused here.
"""

import json
import re
from collections.abc import Mapping
from math import isfinite, sqrt
from typing import Any

from merge.errors import Unsupported
from merge.formats.header import Header
from merge.formats.keys import Location
from merge.formats.metadata import DIFFUSERS_CONFIG, ONETRAINER_CONFIG, read_json
from merge.formats.patterns import Patterns
from merge.formats.shapes import Dims

_LORA_LAYOUTS = ("lora", "lora-embedding", "lora-experts", "lora-mha", "lora-torchtune")
_KRONECKER_LAYOUTS = ("loha", "lokr")
# What each of these means is not in the tensors of a PEFT file.
NEEDS_CONFIG = frozenset(
    {*_LORA_LAYOUTS, *_KRONECKER_LAYOUTS, "lora-mlx", "adalora", "oft-peft", "hra", "tokens"}
)
_MLX_SCALE = 20.0  # mlx-lm's default
_ADALORA_RANK = 12  # PEFT's default of init_r


# The order in which transformers' mixtures of experts define their packed parameters.
_DEFINED = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj")
# Models of transformers whose packed experts are (n, in, out) and not (n, out, in).
_TRANSPOSED = ("GptOss", "OpenAIPrivacyFilter", "Aria")


class Configs:
    """The configurations of a file by component; `source` is "config", "metadata" or "assumed"."""

    def __init__(self, header: Header, config: Mapping[str, Any] | None, name: str) -> None:
        self._name = name
        self.source = "assumed"
        self.dora_eps = _dora_eps(header.metadata)
        self._configs: Mapping[str | None, Config] = {}
        if config is not None:
            self._configs = {None: Config(config, name)}
            self.source = "config"
        elif DIFFUSERS_CONFIG in header.metadata:
            parsed = _by_component(header.metadata[DIFFUSERS_CONFIG], name)
            self._configs = {component: Config(its, name) for component, its in parsed.items()}
            self.source = "metadata"

    def of(self, component: str) -> "Config | None":
        return self._configs.get(component, self._configs.get(None))


class Config:
    """One configuration; Unsupported for what cannot be merged, said in its words."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        check_config(config, name)
        self._config = config
        self._name = name
        self._kind = str(config.get("peft_type", ""))
        self._alphas = Patterns(_mapping(config.get("alpha_pattern")), name)
        ranks = _mapping(config.get("rank_pattern"))
        # AdaLoRA keeps lists of what it pruned under the same name.
        self._ranks = Patterns({k: r for k, r in ranks.items() if isinstance(r, int)}, name)
        self.targets_parameters = _strings(config.get("target_parameters"))

    def facts(
        self, layout: str, location: Location, dims: Dims, *, has_alpha: bool
    ) -> dict[str, Any]:
        """Entry.facts of one module; an alpha in the file comes before one in the configuration."""
        if self._kind in READ_TYPES and layout not in {*READ_TYPES[self._kind], *_BESIDE}:
            why = f"its configuration says {self._kind} and its tensors are {layout}"
            raise Unsupported(self._name, why)
        found: dict[str, Any] = {}
        if not has_alpha and (scale := self._scale(layout, location, dims)) is not None:
            found["scale"] = scale
        if layout == "lora-torchtune":
            found["rope_heads"] = self._rope_heads(location)
        elif layout == "oft-peft":
            found |= self._oft_options()
        elif layout == "hra":
            found["is_gram_schmidt"] = bool(self._config.get("apply_GS"))
        elif layout == "ia3-peft":
            found |= self._ia3_options(location)
        elif layout == "tokens":
            found["token_ids"] = self._token_ids(location)
        elif layout == "lora-experts" and (name := self._model()):
            found["experts_transposed"] = name.startswith(_TRANSPOSED)
        elif layout == "glora-paper" and "eval_config" in self._config:
            found["eval_config"] = self._config["eval_config"]
        if self._config.get("fan_in_fan_out"):
            found["fan_in_fan_out"] = True
        return found

    def _model(self) -> str:
        """The class of the base, which PEFT states for models that it has no type for."""
        return str(_mapping(self._config.get("auto_mapping")).get("base_model_class") or "")

    def _scale(self, layout: str, location: Location, dims: Dims) -> float | None:
        if layout in _LORA_LAYOUTS:
            return self._lora_scale(location, dims)
        if layout in _KRONECKER_LAYOUTS:
            return self._lycoris_scale(location)
        if layout == "lora-mlx":
            return self._mlx_scale()
        return self._adalora_scale() if layout == "adalora" else None

    def experts(self, location: Location) -> tuple[str, int] | None:
        """(parameter's name, rank) of a module whose packed experts are targeted, else None.

        PEFT wraps a module once for each of its targeted parameters, the first of the model's
        definition innermost, and the file does not name them.
        """
        names = [
            parameter
            for target in self.targets_parameters
            for module, _, parameter in [target.rpartition(".")]
            if location.whole == module or location.whole.endswith(f".{module}")
        ]
        if not names:
            return None
        if len(names) > 1 and not set(names) <= set(_DEFINED):
            why = f"the order of its targets ({', '.join(names)}) is not known"
            raise Unsupported(self._name, why)
        if location.wraps >= len(names):
            raise Unsupported(self._name, f"{location.whole} is wrapped more often than targeted")
        outermost_first = sorted(
            names, key=_DEFINED.index if len(names) > 1 else None, reverse=True
        )
        parameter = outermost_first[location.wraps]
        return parameter, self._rank(f"{location.whole}.{parameter}")

    def _rank(self, path: str) -> int:
        rank = self._ranks.first(path, self._config.get("r", 8))
        if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
            raise Unsupported(self._name, f"its configuration has the rank {rank!r}")
        return rank

    def _lora_scale(self, location: Location, dims: Dims) -> float:
        path, rank = location.whole, dims.rank
        if (target := self.experts(location)) is not None:
            path, rank = f"{path}.{target[0]}", target[1]  # patterns are of parameters then
        alpha = self._alpha(path, "lora_alpha")
        assert rank is not None
        return alpha / (sqrt(rank) if self._config.get("use_rslora") else float(rank))

    def _lycoris_scale(self, location: Location) -> float:
        """PEFT's LoHa and LoKr: alpha / r whatever the factors are, also for two full ones."""
        return self._alpha(location.whole, "alpha") / self._rank(location.whole)

    def _rope_heads(self, location: Location) -> int:
        """Heads of a query or key projection, whose rows torchtune orders otherwise; 0 for others."""
        kinds = {".self_attn.q_proj": "num_heads", ".self_attn.k_proj": "num_kv_heads"}
        name = next((kinds[end] for end in kinds if location.path.endswith(end)), None)
        if name is None:
            return 0
        heads = self._config.get(name)
        if type(heads) is not int or heads <= 0:
            why = f"torchtune orders rows of {location.path} by head, and {name} is not stated"
            raise Unsupported(self._name, why)
        return heads

    def _adalora_scale(self) -> float:
        """lora_alpha / (init_r + 1e-5); the rank that pruning left does not enter (PEFT 0.21)."""
        first = self._number("init_r", self._config.get("init_r", _ADALORA_RANK))
        alpha = self._number("lora_alpha", self._config.get("lora_alpha", 8))
        return (alpha if alpha > 0 else first) / (first + 1e-5)

    def _mlx_scale(self) -> float:
        parameters = _mapping(self._config.get("lora_parameters"))
        return self._number("scale", parameters.get("scale", _MLX_SCALE))

    def _alpha(self, path: str, name: str) -> float:
        default = self._config.get(name, 8)  # PEFT's default
        return self._number("alpha", self._alphas.first(path, default))

    def _number(self, what: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise Unsupported(self._name, f"its configuration has the {what} {value!r}")
        return float(value)

    def _oft_options(self) -> dict[str, Any]:
        coft = {"coft_eps": self._number("eps", self._config.get("eps", 6e-5))}
        return {
            **(coft if self._config.get("coft") else {}),
            "block_share": bool(self._config.get("block_share", False)),
            "use_cayley_neumann": bool(self._config.get("use_cayley_neumann", True)),
            "num_cayley_neumann_terms": self._config.get("num_cayley_neumann_terms", 5),
        }

    def _ia3_options(self, location: Location) -> dict[str, Any]:
        modules = self._config.get("feedforward_modules")
        if modules is None:
            return {}
        path = location.whole
        if isinstance(modules, str):
            return {"is_feedforward": re.fullmatch(modules, path) is not None}
        return {"is_feedforward": any(path.endswith(m) for m in _strings(modules))}

    def _token_ids(self, location: Location) -> list[int]:
        ids = self._config.get("token_indices", self._config.get("trainable_token_indices"))
        if isinstance(ids, dict):
            path = location.whole
            ids = next((its for name, its in ids.items() if path.endswith(name)), None)
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise Unsupported(self._name, "its configuration does not say which tokens it replaces")
        return ids


# What OneTrainer adds to the norms of DoRA, if told to: the step of its factors' dtype at 1.
_STEPS = {"FLOAT_32": 2**-23, "FLOAT_16": 2**-10, "BFLOAT_16": 2**-7}


def _dora_eps(metadata: Mapping[str, str]) -> float:
    settings = _mapping(read_json(metadata, ONETRAINER_CONFIG))
    if not settings.get("lora_decompose_norm_epsilon"):
        return 0.0
    return _STEPS.get(str(settings.get("lora_weight_dtype")), _STEPS["FLOAT_32"])


def _by_component(text: str, name: str) -> dict[str | None, Mapping[str, Any]]:
    """{"unet.r": 4, "unet.lora_alpha": 8} -> {"unet": {"r": 4, "lora_alpha": 8}}.

    UNet2DConditionModel.save_lora_adapter writes the keys without a component.
    """
    try:
        flat = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unsupported(name, f"its metadata {DIFFUSERS_CONFIG} is not JSON") from error
    configs: dict[str | None, dict[str, Any]] = {}
    for key, value in _mapping(flat).items():
        component, dot, field = key.partition(".")
        configs.setdefault(component if dot else None, {})[field if dot else key] = value
    return dict(configs)


READ_TYPES: Mapping[str, tuple[str, ...]] = {
    "LORA": _LORA_LAYOUTS,
    "LOHA": ("loha",),
    "LOKR": ("lokr",),
    "ADALORA": ("adalora",),
    "VERA": ("vera",),
    "IA3": ("ia3-peft",),
    "OFT": ("oft-peft",),
    "BOFT": ("boft-peft",),
    "GLORA": ("glora-paper",),
    "HRA": ("hra",),
    "HIRA": ("hira",),
    "LN_TUNING": (),
    "TRAINABLE_TOKENS": (),
}
# Saved with any of them: modules_to_save, biases, trainable_token_indices.
_BESIDE = ("replacement", "tokens")
_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT",
            "ADAPTION_PROMPT", "CARTRIDGE")  # fmt: skip
_WHY = {
    "XLORA": "X-LoRA mixes several adapters by what it is given, which is no change of weights",
    "POLY": "Poly routes among several adapters, which is no change of weights",
    **{
        kind: f"{kind} trains inputs of the model, which is no change of weights"
        for kind in _PROMPTS
    },
}
# Initialisations that change the base, so that the file alone is not the difference.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_NOT_PLAIN = {
    "alora_invocation_tokens": "it acts only after certain tokens (aLoRA)",
    "arrow_config": "it routes among several adapters (Arrow)",
    "use_qalora": "it pools its inputs (QALoRA)",
    "layer_replication": "it repeats layers of the base (layer_replication)",
    "megatron_config": "it was trained in Megatron's parallel layers",
    "use_bdlora": "its factors are block diagonal (BD-LoRA)",
    "kasa_config": "it subtracts part of the base (KaSA)",
    "monteclora_config": "it samples its factors (MonteCLoRA)",
    "velora_config": "it compresses what it is given (VeLoRA)",
}


def check_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse what a configuration says about a file and its tensors do not show."""
    kind = config.get("peft_type", "LORA")
    if kind not in READ_TYPES:
        why = _WHY.get(kind, f"its configuration says {kind}, a method that cannot be merged")
        raise Unsupported(name, why)
    if kind == "VERA" and config.get("save_projection") is False:
        why = "its shared projections are not in the file (save_projection was false)"
        raise Unsupported(name, why)
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGED_BASE):
        why = f"it was initialised with {initial}, which changes the base it belongs to"
        raise Unsupported(name, why)
    for field, why in _NOT_PLAIN.items():
        if config.get(field):
            raise Unsupported(name, why)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list) else ()
