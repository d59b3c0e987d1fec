"""Recipes of other tools: what becomes of each, what is said about it, and what is refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from merge.errors import BadRecipe
from merge.execute import execute
from merge.families import FAMILIES, Family
from merge.imports import Imported, Named, Wanted, import_recipe
from merge.pins import pin
from merge.plan import plan
from merge.recipe import Recipe
from tests.fixtures.engine import load_deltas
from tests.fixtures.families import tiny_family
from tests.merge.test_second_implementations import (
    _linear_layers,
    _peft_deltas,
    _peft_folder,
    _with_both,
)

LAYERS = 3
PARTS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
MODULES = tuple(f"model.model.layers.{i}.{part}" for i in range(LAYERS) for part in PARTS)
SHA256 = "a" * 64
# a, b and c are language adapters, ink and robot adapters of images; `far` is not at hand.
HELD = {
    name: Named(f"{name}.safetensors", None, MODULES, rank)
    for name, rank in zip("abc", (4, 8, 6), strict=True)
}
for image in ("ink", "robot"):
    HELD[image] = Named(
        f"{image}.safetensors",
        None,
        ("unet.to_q", "text_encoder.q_proj", "text_encoder_2.q_proj"),
        4,
    )
HELD["far"] = Named("hf://org/far")


def resolve(wanted: Wanted) -> Named:
    if wanted.what == "base":
        return Named(f"hf://{wanted.name}")
    if wanted.name not in HELD:
        raise BadRecipe(wanted.param, f"nobody knows {wanted.name}")
    held = HELD[wanted.name]
    return Named(held.ref, wanted.sha256, held.modules, held.rank)


def imported(text: str | dict[str, Any]) -> Imported:
    return import_recipe(text if isinstance(text, str) else yaml.safe_dump(text), resolve)


def said(found: Imported) -> dict[str, Any]:
    """The recipe without defaults."""
    return found.recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)


# Prompts


def test_numbers_of_a_prompt_are_for_text_encoders_and_the_denoiser() -> None:
    found = imported(
        "a cat, <lora:ink:0.8>, (by <lyco:robot:0.5:0.9>:1.2) <lora:ink> <hypernet:x:1>\n"
        "<lora:robot:te=0.2:unet=-1>"
    )
    encoders = ("text_encoder", "text_encoder_2")
    assert said(found)["inputs"] == [
        {"ref": "ink.safetensors", "strength": 0.8},
        {"ref": "robot.safetensors", "strength": 0.9, "components": dict.fromkeys(encoders, 0.5)},
        {"ref": "ink.safetensors"},
        {"ref": "robot.safetensors", "strength": -1.0, "components": dict.fromkeys(encoders, 0.2)},
    ]
    assert found.tool == "a prompt"
    assert found.notes == (
        "ink is named more than once: its strengths add up",
        "<hypernet:x:1> names no adapter and is left out",
        "robot is named more than once: its strengths add up",
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<lora:ink:loud>", "<lora:ink:loud>: 'loud' is no number"),
        ("<lora:ink:1:1:8>", "cuts the rank while images are made"),
        ("<lora:ink:dyn=8>", "cuts the rank while images are made"),
        ("<lora:ink:1:1:8:9>", "there is one argument too many"),
        ("<lora:ink:lr=1>", "lr is no argument"),
        ("<lora:nope:1>", "<lora:nope:1>: nobody knows nope"),
        ("<lora:far:1:0.5>", "its text encoders are only known from the file"),
        ("<hypernet:x:1>", "names no adapter"),
        ("a cat", "is nothing that can be imported"),
    ],
)
def test_a_prompt_that_cannot_be_said_is_refused(text: str, says: str) -> None:
    with pytest.raises(BadRecipe) as caught:
        imported(text)
    assert says in str(caught.value)


# ComfyUI-Lora-Manager


def lora_manager(**fields: Any) -> dict[str, Any]:
    return {
        "id": "3f2c",
        "title": "Ink robot",
        "base_model": "SDXL 1.0",
        "loras": [
            {"file_name": "ink", "hash": SHA256.upper(), "strength": 0.7, "isDeleted": False},
            {"file_name": "robot", "hash": "", "weight": "0.5", "clipStrength": 0.2},
            {"file_name": "a", "hash": SHA256, "strength": 1, "exclude": True},
        ],
        "gen_params": {"prompt": "a robot"},
        **fields,
    }


@pytest.mark.parametrize("is_embedded", [False, True])
def test_a_recipe_of_lora_manager_is_its_loras_by_content(is_embedded: bool) -> None:
    text = json.dumps(lora_manager(checkpoint={"name": "x"}))
    if is_embedded:
        text = f"a robot\nSteps: 20, Recipe metadata: {text}\nmore {{text}}"
    found = imported(text)
    assert said(found)["inputs"] == [
        {"ref": "ink.safetensors", "sha256": SHA256, "strength": 0.7},
        {
            "ref": "robot.safetensors",
            "strength": 0.5,
            "components": {"text_encoder": 0.2, "text_encoder_2": 0.2},
        },
    ]
    assert found.notes == (
        "loras[1] has no hash: robot is found by its name alone",
        "loras[2] (a) is excluded there and left out",
        "the checkpoint takes no part: a merge needs none, and a bake can name it",
    )


@pytest.mark.parametrize(
    ("loras", "says"),
    [
        ([], "loras: names no adapter that takes part"),
        ("ink", "loras: is not a list"),
        ([1], "loras[0]: is not an object"),
        ([{"file_name": "ink", "strength": "x"}], "loras[0].strength: 'x' is no number"),
        ([{"file_name": "nope"}], "loras[0]: nobody knows nope"),
    ],
)
def test_a_recipe_of_lora_manager_that_cannot_be_said_is_refused(loras: Any, says: str) -> None:
    with pytest.raises(BadRecipe) as caught:
        imported(json.dumps(lora_manager(loras=loras)))
    assert says in str(caught.value)


# PEFT


def peft(**fields: Any) -> dict[str, Any]:
    return {"adapters": ["a", "b"], "weights": [0.7, 0.5], "adapter_name": "x", **fields}


@pytest.mark.parametrize(
    ("fields", "method", "rank", "note"),
    [
        ({"combination_type": "cat"}, None, None, None),
        ({}, None, 8, None),
        ({"svd_rank": 5, "svd_driver": "gesvd"}, None, 5, None),
        ({"combination_type": "linear"}, None, None, "cross terms"),
        (
            {"combination_type": "ties_svd", "density": 0.3, "majority_sign_method": "frequency"},
            {"name": "ties", "density": 0.3, "vote": "count"},
            8,
            "PEFT elects signs before the weights count",
        ),
        (
            {"combination_type": "ties", "density": 0.5},
            {"name": "ties", "density": 0.5},
            8,
            "cross",
        ),
        (
            {"combination_type": "dare_ties_svd", "density": 0.4, "svd_rank": 3},
            {"name": "dare", "density": 0.4, "elect": True},
            3,
            "other random numbers",
        ),
        (
            {"combination_type": "dare_linear_svd", "density": 0.4},
            {"name": "dare", "density": 0.4},
            8,
            "other random numbers",
        ),
        (
            {"combination_type": "magnitude_prune_svd", "density": 0.4},
            {"name": "magnitude", "density": 0.4},
            8,
            None,
        ),
    ],
)
def test_arguments_of_peft_become_the_method_they_mean(
    fields: dict[str, Any], method: Any, rank: int | None, note: str | None
) -> None:
    found = imported(json.dumps(peft(**fields)))
    assert found.recipe.method.model_dump(exclude_defaults=True) == (method or {})
    assert found.recipe.rank.fixed == rank
    assert found.recipe.output.dialect == "peft"
    assert [its.strength for its in found.recipe.inputs] == [0.7, 0.5]
    assert any(note in text for text in found.notes) if note else found.notes == ()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"svd_clamp": 0.99}, "svd_clamp: cuts off the largest entries"),
        ({"weights": [1.0]}, "weights: is not a list of 2 numbers"),
        ({"weights": [1.0, True]}, "weights[1]: True is no number"),
        ({"adapters": "a"}, "adapters: is not a list of names"),
        ({"adapters": ["a", "nope"]}, "adapters[1]: nobody knows nope"),
        ({"adapters": ["a", "far"]}, "svd_rank: say one: not all adapters are at hand"),
        ({"svd_rank": 0}, "svd_rank: 0 is no rank"),
        ({"combination_type": "slerp"}, "combination_type: 'slerp' is none of PEFT's"),
        ({"combination_type": "ties"}, "density: ties needs the share"),
        (
            {"combination_type": "ties", "density": 0.1, "majority_sign_method": "x"},
            "majority_sign_method: 'x' is neither",
        ),
        (
            {"combination_type": "dare_ties", "density": 0.1, "majority_sign_method": "frequency"},
            "dare elects signs by total alone",
        ),
    ],
)
def test_arguments_of_peft_that_cannot_be_said_are_refused(
    fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadRecipe) as caught:
        imported(json.dumps(peft(**fields)))
    assert says in str(caught.value)


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Family:
    found = tiny_family("sd15-tiny")
    monkeypatch.setitem(FAMILIES, found.name, found)
    return found


@pytest.mark.parametrize(
    ("arguments", "weights"),
    [
        ({"combination_type": "cat"}, [0.7, -0.5]),
        ({"combination_type": "svd", "svd_rank": 4}, [0.7, 0.5]),
        ({"combination_type": "ties_svd", "density": 0.5}, [0.5, 0.5]),
        ({"combination_type": "magnitude_prune_svd", "density": 0.25}, [0.7, -0.5]),
    ],
)
def test_what_peft_makes_of_its_arguments_is_what_the_recipe_makes(
    family: Family, tmp_path: Path, arguments: dict[str, Any], weights: list[float]
) -> None:
    names = [name for name in _linear_layers(family) if name[1].endswith(("to_q", "to_v"))]
    layers = [family.components[component][module] for component, module in names]
    side = {min(its.in_features, its.out_features) for its in layers}
    made = [
        _peft_folder(tmp_path / name, family, names, rank, seed)
        for name, rank, seed in (("a", 3, 1), ("b", 5, 2))
    ]
    if "density" in arguments:  # at full rank, where nothing is cut
        arguments = arguments | {"svd_rank": min(side)}
        assert len(side) == 1
    model = _with_both(made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["a", "b"], weights, "x", **arguments)
    theirs = _peft_deltas(model, names, "x")
    places = {name: str(its.path) for name, its in zip("ab", made, strict=True)}
    found = import_recipe(
        json.dumps({"adapters": ["a", "b"], "weights": weights, **arguments}),
        lambda wanted: Named(places[wanted.name], None, ("unet.x",), 5),
    )
    recipe = Recipe.parse(said(found) | {"output": {"dialect": "kohya", "dtype": "float32"}})
    pinned = recipe.pin({ref: pin(Path(ref)) for ref in recipe.refs()})
    out = tmp_path / "out.safetensors"
    execute(plan(pinned, {ref: Path(ref) for ref in recipe.refs()}), out)
    ours = load_deltas(out, family, names)
    for name in names:
        np.testing.assert_allclose(ours[name], theirs[name].reshape(ours[name].shape), atol=1e-5)


# mergekit


def mergekit(method: str, *models: Any, **fields: Any) -> dict[str, Any]:
    """`models` are names of adapters with a weight, or whole entries."""
    entries = [
        its
        if isinstance(its, dict)
        else {"model": f"org/base+{its[0]}", "parameters": {"weight": its[1]}}
        for its in models
    ]
    return {"merge_method": method, "base_model": "org/base", "models": entries, **fields}


AB = (("a", 0.6), ("b", 0.2))


@pytest.mark.parametrize(
    ("document", "method", "strengths"),
    [
        (mergekit("linear", *AB), None, [0.75, 0.25]),
        (
            mergekit("linear", ("a", 0.3), ("b", 0.7), parameters={"normalize": False}),
            None,
            [0.3, 0.7],
        ),
        (mergekit("task_arithmetic", *AB), None, [0.6, 0.2]),
        (mergekit("task_arithmetic", *AB, parameters={"lambda": 0.5}), None, [0.3, 0.1]),
        (mergekit("task_arithmetic", *AB, parameters={"normalize": True}), None, [0.75, 0.25]),
        (
            mergekit("ties", ("a", 0.4), ("b", 0.4), parameters={"density": 0.3, "lambda": 0.9}),
            {"name": "ties", "density": 0.3, "scale": 0.9},
            [1.0, 1.0],
        ),
        (
            mergekit("ties", *AB, parameters={"normalize": False}),
            {"name": "ties", "density": 1.0, "combine": "sum"},
            [0.6, 0.2],
        ),
        (mergekit("ties", *AB), {"name": "ties", "density": 1.0}, [1.5, 0.5]),
        (
            mergekit("dare_linear", *AB, parameters={"density": 0.5}),
            {"name": "dare"},
            [0.6, 0.2],
        ),
        (
            mergekit("dare_ties", *AB, parameters={"density": 0.4}),
            {"name": "dare", "density": 0.4, "elect": True, "combine": "sum"},
            [0.6, 0.2],
        ),
        (
            mergekit("breadcrumbs", *AB, parameters={"density": 0.9, "gamma": 0.02}),
            {"name": "breadcrumbs", "gamma": 0.02},
            [0.6, 0.2],
        ),
        (
            mergekit("breadcrumbs_ties", *AB, parameters={"density": 0.8}),
            {"name": "breadcrumbs", "density": 0.8, "elect": True, "combine": "sum"},
            [0.6, 0.2],
        ),
        (
            mergekit("della", ("a", 1), ("b", 1), parameters={"density": 0.6}),
            {"name": "della", "density": 0.6, "epsilon": 0.15},
            [1.0, 1.0],
        ),
        (
            mergekit("della_linear", *AB, parameters={"density": 0.6, "epsilon": 0.1}),
            {"name": "della", "density": 0.6, "elect": False},
            [0.6, 0.2],
        ),
        (mergekit("nuslerp", *AB), {"name": "slerp"}, [0.6, 0.2]),
        (mergekit("nuslerp", *AB, base_model=None), None, [0.75, 0.25]),
        (
            mergekit("slerp", *AB, base_model="org/base+b", parameters={"t": 0.3, "weight": 1})
            | {
                "models": [{"model": "org/base+a"}, {"model": "org/base+b"}],
                "parameters": {"t": 0.3},
            },
            None,
            [0.3, 0.7],
        ),
        (
            mergekit("karcher", {"model": "org/base+a"}, {"model": "org/base+b"}, base_model=None),
            None,
            [0.5, 0.5],
        ),
        (
            mergekit(
                "model_stock", {"model": "org/base"}, *({"model": f"org/base+{x}"} for x in "abc")
            ),
            {"name": "model_stock"},
            [1.0, 1.0, 1.0],
        ),
        (
            mergekit("linear", {"model": "org/base", "parameters": {"weight": 1}}, ("a", 3)),
            None,
            [0.75],
        ),
        (
            mergekit("ties", {"model": "org/base"}, ("a", 0.5)),
            {"name": "ties", "density": 1.0},
            [1.0],
        ),
    ],
)
def test_methods_of_mergekit_become_what_they_do_to_adapters(
    document: dict[str, Any], method: Any, strengths: list[float]
) -> None:
    found = imported(document)
    assert found.recipe.method.model_dump(exclude_defaults=True) == (method or {})
    assert [its.strength for its in found.recipe.inputs] == pytest.approx(strengths)
    assert found.recipe.kind == "bake"
    assert found.recipe.base is not None
    assert found.recipe.base.ref == "hf://org/base"


def test_a_slice_of_all_layers_is_a_merge_of_models() -> None:
    sources = [
        {"model": f"org/base+{name}", "layer_range": [0, 32], "parameters": {"weight": 0.5}}
        for name in "ab"
    ]
    found = imported(
        {
            "merge_method": "task_arithmetic",
            "base_model": "org/base",
            "slices": [{"sources": sources}],
        }
    )
    assert [its.strength for its in found.recipe.inputs] == [0.5, 0.5]
    assert found.notes == ("layer_range [0, 32] is taken for all layers",)


def strengths_of(setting: Any, **fields: Any) -> dict[str, float]:
    """The strength of `a` in every module."""
    found = imported(mergekit("task_arithmetic", ("a", setting), ("b", 1.0), **fields))
    first = found.recipe.inputs[0]
    return {name.removeprefix("model."): first.strength_at("model", name[6:]) for name in MODULES}


def by_part(*values: float) -> dict[str, float]:
    return {name[6:]: values[i % len(PARTS)] for i, name in enumerate(MODULES)}


def test_the_first_filter_that_fits_decides() -> None:
    filters = [
        {"filter": "q_proj", "value": 0.1},
        {"filter": "self_attn", "value": 0.2},
        {"value": 0.3},
    ]
    assert strengths_of(filters) == pytest.approx(by_part(0.1, 0.2, 0.3))
    # In another order q_proj is never reached.
    assert strengths_of(filters[1::-1] + filters[2:]) == pytest.approx(by_part(0.2, 0.2, 0.3))
    assert strengths_of([{"filter": "*", "value": 0.5}]) == pytest.approx(by_part(0.5, 0.5, 0.5))


def test_a_gradient_is_spread_over_the_layers() -> None:
    found = strengths_of([0.0, 0.4, 1.0, 0.2, 0.0])  # five values, three layers: 0, 1.0, 0
    wanted = {name[6:]: [0.0, 1.0, 0.0][i // len(PARTS)] for i, name in enumerate(MODULES)}
    assert found == pytest.approx(wanted)
    mixed = strengths_of([{"filter": "mlp", "value": [1.0, 0.0]}, {"value": 0.5}])
    assert [mixed[name[6:]] for name in MODULES] == pytest.approx(
        [0.5, 0.5, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0]
    )


def test_weights_are_divided_by_their_sum_in_every_layer() -> None:
    gradient = mergekit("linear", ("a", [1.0, 3.0]), ("b", 1.0))
    inputs = imported(gradient).recipe.inputs
    for layer, shares in enumerate([(1 / 2, 1 / 2), (2 / 3, 1 / 3), (3 / 4, 1 / 4)]):
        name = f"model.layers.{layer}.mlp.down_proj"
        found = [its.strength_at("model", name) for its in inputs]
        assert found == pytest.approx(shares)


def test_blocks_are_said_by_groups_where_they_can_be() -> None:
    kinds = imported(
        mergekit(
            "task_arithmetic", ("a", [{"filter": "mlp", "value": 0.3}, {"value": 1}]), ("b", 1)
        )
    )
    assert kinds.recipe.inputs[0].blocks == {"*.mlp.*": 0.3}
    layers = imported(mergekit("task_arithmetic", ("a", [0.5, 1.0]), ("b", 1)))
    assert layers.recipe.inputs[0].blocks == {"*.layers.0.*": 0.5, "*.layers.1.*": 0.75}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (mergekit("passthrough", *AB), "merge_method: passthrough has no meaning for adapters"),
        (mergekit("sce", *AB), "it keeps what varies most between models"),
        (mergekit("vibes", *AB), "merge_method: 'vibes' is no method"),
        (mergekit("ties", *AB, shape="x"), "shape: is no field"),
        (
            mergekit("ties", ("a", 1), {"model": "org/other+b"}),
            "models[1].model: org/other is another",
        ),
        (
            mergekit("ties", ("a", 1), {"model": "org/tuned"}),
            "org/tuned is another base than org/base",
        ),
        (mergekit("ties", {"model": 3}), "models[0].model: is not the name"),
        (mergekit("ties", ("nope", 1)), "models[0].model: nobody knows nope"),
        (mergekit("ties", {"model": "org/base+a"}), "models[0].parameters.weight: is missing"),
        (mergekit("ties", ("a", "loud")), "one number can be said here, not 'loud'"),
        (
            mergekit("ties", *AB, parameters={"density": [0.1, 0.2]}),
            "parameters.density: one number",
        ),
        (mergekit("ties", *AB, parameters={"rescale": True}), "ties with rescaling cannot be said"),
        (
            mergekit("dare_linear", *AB, parameters={"rescale": False}),
            "dare_linear without rescaling cannot be said",
        ),
        (mergekit("ties", *AB, parameters={"vibe": 1}), "parameters.vibe: is no parameter"),
        (mergekit("linear", *AB, parameters={"normalize": False}), "the weights add up to 0.8"),
        (mergekit("linear", ("a", 1), ("b", -1)), "the weights add up to 0"),
        (mergekit("nuslerp", *AB, parameters={"nuslerp_row_wise": True}), "only layers as a whole"),
        (mergekit("nuslerp", *AB, ("c", 1)), "nuslerp is between two models"),
        (mergekit("slerp", *AB), "parameters.t: is missing"),
        (mergekit("slerp", *AB, parameters={"t": 0.5}), "base_model: is neither of the two"),
        (mergekit("model_stock", *AB, parameters={"filter_wise": True}), "layers as a whole"),
        (mergekit("task_arithmetic", ("far", [0, 1])), "filters and gradients need the adapters"),
        (
            mergekit("task_arithmetic", ("a", [{"filter": "mlp", "value": 1}])),
            "no filter matches model.model.layers.0.self_attn.q_proj",
        ),
        (mergekit("task_arithmetic", ("a", [])), "is an empty list"),
        (mergekit("task_arithmetic", *AB) | {"models": []}, "models: is not a list of models"),
        (mergekit("task_arithmetic", *AB) | {"modules": {}}, "models put together from several"),
        (
            {"merge_method": "ties", "slices": [{"sources": []}, {"sources": []}]},
            "slices: several slices stack layers",
        ),
        (
            mergekit(
                "ties",
                {"model": "org/base+a", "parameters": {"weight": 1, "density": 0.1}},
                {"model": "org/base+b", "parameters": {"weight": 1, "density": 0.2}},
            ),
            "parameters.density: one for all adapters can be said, not 0.1, 0.2",
        ),
    ],
)
def test_what_mergekit_means_and_we_cannot_say_is_refused_by_name(
    document: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadRecipe) as caught:
        imported(document)
    assert says in str(caught.value)


def test_what_is_different_here_is_said() -> None:
    unequal = imported(mergekit("ties", *AB, dtype="bfloat16", tokenizer_source="union"))
    assert [note.partition(" ")[0] for note in unequal.notes] == [
        "where",
        "dtype",
        "tokenizer_source:",
    ]
    assert "divides by the probability" in imported(mergekit("dare_linear", *AB)).notes[0]
    whole = imported(
        mergekit("karcher", ("a", 1), ("b", 1)) | {"models": [{"model": "org/base+a"}]}
    )
    assert "works on whole models" in whole.notes[0]
