"""Writing: the keys of every dialect, and the configuration its readers want beside them.

A dialect holds some layouts and not others. kohya means what kohya's trainer and LyCORIS write,
comfy what ComfyUI reads, peft a folder of PEFT, diffusers what its pipelines load.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from merge.families import FAMILIES, Family
from merge.families.family import OWN, TEXT_MODEL, Layer

WRITABLE_DIALECTS = ("kohya", "diffusers", "peft", "comfy")

# Component of an adapter for a model that no family describes.
MODEL = "model"


def _dotted(roles: str) -> dict[str, str]:
    return {role: f".{role}" for role in roles.split()}


_SPARSE = _dotted("bias_indices bias_values bias_size")
_LYCORIS: Mapping[str, Mapping[str, str]] = {
    "lora": {
        "down": ".lora_down.weight",
        "up": ".lora_up.weight",
        "mid": ".lora_mid.weight",
        **_dotted("alpha scalar dora_scale"),
        **_SPARSE,
    },
    "loha": _dotted(
        "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 alpha scalar dora_scale"
    ),
    "lokr": _dotted(
        "lokr_w1 lokr_w1_a lokr_w1_b lokr_t1 lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 alpha scalar "
        "dora_scale"
    ),
    "glora": {
        **{role: f".{role}.weight" for role in ("a1", "a2", "b1", "b2", "bm")},
        **_dotted("alpha scalar dora_scale"),
    },
    "oft": _dotted("oft_blocks alpha rescale dora_scale"),
    "boft": _dotted("oft_blocks alpha rescale dora_scale"),
    "full": _dotted("diff diff_b"),
    "norm": _dotted("w_norm b_norm"),
}
_LORA_OF_PEFT = {
    "down": ".lora_A.weight",
    "up": ".lora_B.weight",
    "up_bias": ".lora_B.bias",
    "dora_scale": ".lora_magnitude_vector",
}
# Dialect -> layout -> role -> suffix. What is not here, the dialect does not hold.
SUFFIXES: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "kohya": {
        **_LYCORIS,
        "ia3": _dotted("weight on_input alpha"),
        "oft-legacy": _dotted("oft_diag alpha rescale"),
    },
    "comfy": {**_LYCORIS, "replacement": {"set_weight": ".set_weight"}},
    "diffusers": {"lora": _LORA_OF_PEFT},
    "peft": {
        "lora": _LORA_OF_PEFT,
        "loha": _dotted("hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2"),
        "lokr": _dotted("lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"),
    },
}
# Dialects whose files hold alphas; the others have a configuration.
HOLDS_ALPHA = frozenset({"kohya", "comfy"})


def holds(dialect: str, layout: str, roles: Iterable[str]) -> bool:
    """Whether a dialect has a key for every one of these roles of a layout."""
    return set(roles) <= SUFFIXES[dialect].get(layout, {}).keys() | {"alpha"}


def naming_of(dialect: str, component: str, family: Family | None) -> str:
    """The naming of layers in which a dialect is written for a component."""
    if family is None:
        return OWN
    namings = {"kohya": family.kohya_naming, "comfy": family.comfy_naming}.get(dialect, {})
    return namings.get(component, OWN)


def output_layers(
    modules: Iterable[tuple[str, str]], dialect: str, family: Family
) -> dict[tuple[str, str], Layer]:
    """(component, path) -> layer, in a dialect's naming, of every layer that has rows of `modules`."""
    wanted: dict[str, set[str]] = {}
    for component, module in modules:
        wanted.setdefault(component, set()).add(module)
    found = {}
    for component, its_modules in wanted.items():
        layers = family.layers[component][naming_of(dialect, component, family)]
        for path, layer in layers.items():
            if any(run.module in its_modules for run in layer.runs):
                found[component, path] = layer
    return found


def keys_of(
    component: str, path: str, layout: str, dialect: str, family: Family | None
) -> dict[str, str]:
    """Role -> key for a layer, `path` in the dialect's naming.

    Only kohya and comfy have a key for `alpha`. diffusers wants `diffusers_config` in the metadata
    beside its keys, PEFT wants `peft_config` beside the file; a PEFT file is of one component.
    """
    at = stem(component, path, dialect, family)
    return {role: at + suffix for role, suffix in SUFFIXES[dialect][layout].items()}


_PLAIN_ROLES = ("down", "up", "alpha")


def write_keys(
    modules: Iterable[tuple[str, str]], dialect: str, family: str
) -> dict[tuple[str, str], dict[str, str]]:
    """(component, module) -> {role: key} of plain LoRA, for modules that are whole layers there."""
    table = FAMILIES[family]
    found = {}
    for (component, path), layer in output_layers(modules, dialect, table).items():
        assert layer.module is not None, f"{path} holds several modules"
        keys = keys_of(component, path, "lora", dialect, table)
        found[component, layer.module] = {r: keys[r] for r in _PLAIN_ROLES if r in keys}
    return found


def stem(component: str, path: str, dialect: str, family: Family | None) -> str:
    """A key without its suffix, for the path of a layer in the dialect's naming."""
    if dialect == "peft":
        # PEFT wants the paths of the model in memory, and only CLIPTextModel is flattened there.
        bare = path.removeprefix(TEXT_MODEL) if component == "text_encoder" else path
        return f"base_model.model.{bare}"
    if dialect == "diffusers":
        return f"{component}.{path}"
    assert family is not None, "a model of no family has no names in this dialect"
    if dialect == "kohya":
        return f"{family.kohya[component][0]}_{path.replace('.', '_')}"
    return f"{family.comfy[component]}{path}"


def is_named(component: str, dialect: str, family: Family) -> bool:
    """Whether a dialect has a name for a component."""
    return component in {"kohya": family.kohya, "comfy": family.comfy}.get(dialect, [component])


def peft_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    kind: str = "LORA",
    **more: Any,
) -> dict[str, Any]:
    """adapter_config.json for modules of one component with these ranks and alphas.

    Targets are without `text_model.`, which transformers dropped from CLIPTextModel in 5.6: PEFT
    compares the ends of paths, so that they fit models of either kind.
    """
    modules = sorted(ranks)
    rank, alpha = _most_common(ranks), _most_common(alphas)
    shared = {
        "peft_type": kind,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha" if kind == "LORA" else "alpha": alpha,
        "target_modules": [module.removeprefix(TEXT_MODEL) for module in modules],
        "rank_pattern": {_exactly(m): ranks[m] for m in modules if ranks[m] != rank},
        "alpha_pattern": {_exactly(m): alphas[m] for m in modules if alphas[m] != alpha},
        "inference_mode": True,
    }
    return shared | (_PLAIN_LORA if kind == "LORA" else {}) | more


_PLAIN_LORA = {
    "lora_dropout": 0.0,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
}


def diffusers_config(
    ranks: Mapping[tuple[str, str], int],
    alphas: Mapping[tuple[str, str], float],
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The value of `lora_adapter_metadata`: one PEFT configuration per component, flattened.

    `more` holds further fields by component, such as use_dora.
    """
    flat: dict[str, Any] = {}
    for component in sorted({component for component, _ in ranks}):
        config = peft_config(
            {m: rank for (c, m), rank in ranks.items() if c == component},
            {m: alpha for (c, m), alpha in alphas.items() if c == component},
            **(more or {}).get(component, {}),
        )
        flat |= {f"{component}.{field}": value for field, value in config.items()}
    return json.dumps(flat, sort_keys=True)


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values[key] for key in sorted(values)).most_common(1)[0][0]


def _exactly(module: str) -> str:
    """A pattern that matches this path alone: PEFT would let `conv1` match every `…conv1`."""
    anchor = "" if module.startswith(TEXT_MODEL) else "^"
    return anchor + module.removeprefix(TEXT_MODEL).replace(".", r"\.")
