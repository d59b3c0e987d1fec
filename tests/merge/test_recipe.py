"""The declared wish: what it accepts, what it refuses and where, and what its digest covers."""

import hashlib
import json
import re
from pathlib import Path
from typing import get_args

import pytest

from merge.errors import BadRecipe
from merge.method_parameters import Method
from merge.methods import METHODS
from merge.recipe import Input, Output, Pinned, Rank, Recipe

A, B = "a" * 64, "b" * 64
PINS = {"ink": Pinned(sha256=A), "robot": Pinned(sha256=B)}

FULL = """
schema: 1
kind: merge
inputs:
  - ref: ink
    strength: 0.7
    components: {text_encoder: 0.4}
    blocks: {"*.up_blocks.*": 0.5, "*.attn2.*": -1}
  - {ref: robot, strength: 5e-1, leave_out: ["text_encoder.*"]}
method: {name: linear}
rank: {fixed: 16}
output: {dialect: kohya, dtype: float16}
seed: 0
numerics: fast
"""


def test_yaml_and_json_say_the_same_recipe() -> None:
    recipe = Recipe.load(FULL)
    as_json = json.dumps(recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True))
    assert Recipe.load(as_json) == recipe
    assert recipe.inputs[1].strength == 0.5


def test_options_of_the_default_method_come_back_from_yaml() -> None:
    method = {"name": "linear", "normalise": "energy"}
    recipe = Recipe.parse({"kind": "merge", "inputs": [{"ref": "a"}], "method": method})
    assert Recipe.load(recipe.to_yaml()) == recipe


def test_a_recipe_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(FULL, encoding="utf-8")
    assert Recipe.load(tmp_path / "recipe.yaml") == Recipe.load(FULL)
    with pytest.raises(BadRecipe, match="cannot read"):
        Recipe.load(tmp_path / "missing.yaml")


def test_what_is_written_for_people_reads_back() -> None:
    recipe = Recipe.load(FULL).pin(PINS)
    assert Recipe.load(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("text", "param", "says"),
    [
        ("kind: mix\ninputs: [{ref: a}]", "kind", "'merge', 'bake', 'extract' or 'resize'"),
        ("kind: extract\ninputs: [{ref: a}]", "inputs", "none"),
        ("kind: extract\nbase: {ref: a}\nrank: {fixed: 4}", "tuned", "needs the checkpoint"),
        ("kind: extract\ntuned: {ref: a}\nrank: {fixed: 4}", "base", "what was tuned"),
        ("kind: extract\nbase: {ref: a}\ntuned: {ref: b}", "rank", "full rank"),
        ("kind: merge\ntuned: {ref: b}\ninputs: [{ref: a}]", "tuned", "only an extraction"),
        ("kind: resize\ninputs: [{ref: a}, {ref: b}]", "inputs", "one adapter"),
        ("kind: resize\ninputs: [{ref: a, strength: 0.5}]", "inputs", "at strength 1"),
        (
"kind: resize\ninputs: [{ref: a}]\nrank: {fixed: 4}\nmethod: {name: tsv}", "method", "combines nothing"),
("kind: merge\ninputs: [{ref: a}]\nrank: {fixed: 4}\nmethod: {name: della, density: 0.1}", "method", "density - epsilon must be above 0"),
        ("kind: merge", "inputs", "at least one"),
        ("kind: merge\ninputs: []", "inputs", "at least one"),
        ("kind: merge\ninputs: [{ref: a}, {ref: b, strenght: 1}]", "inputs[1].strenght", "there is no such field"),
        ("kind: merge\ninputs: [{ref: a}]\nrnak: {fixed: 2}", "rnak", "there is no such field"),
        ("kind: merge\ninputs: [{ref: a, strength: .nan}]", "inputs[0].strength", "finite"),
        ("kind: merge\ninputs: [{ref: a, strength: .inf}]", "inputs[0].strength", "finite"),
        ("kind: merge\ninputs: [{ref: a, strength: '1'}]", "inputs[0].strength", "valid number"),
        ("kind: merge\ninputs: [{ref: a, strength: true}]", "inputs[0].strength", "valid number"),
        ("kind: merge\ninputs: [{ref: a, sha256: abc}]", "inputs[0].sha256", "pattern"),
        ("kind: merge\ninputs: [{strength: 1}]", "inputs[0]", "needs a ref or a sha256"),
        ("kind: merge\ninputs: [{ref: a, blocks: {x: y}}]", "inputs[0].blocks.x", "valid number"),
        ("kind: merge\ninputs: [{ref: a}]\nrank: {}", "rank", "exactly one"),
        ("kind: merge\ninputs: [{ref: a}]\nrank: {fixed: 2, exact: true}", "rank", "exactly one"),
        ("kind: merge\ninputs: [{ref: a}]\nrank: {fixed: 0}", "rank.fixed", "greater than"),
        ("kind: merge\ninputs: [{ref: a}]\nrank: {energy: 1.5}", "rank.energy", "less than"),
        ("kind: merge\ninputs: [{ref: a}]\nmethod: {name: tie}", "method.name", "'linear'"),
        ("kind: merge\ninputs: [{ref: a}]\nmethod: {density: 1}", "method.name", "required"),
        ("kind: merge\ninputs: [{ref: a}]\nmethod: {name: svc, floor: 2}", "method.floor", "equal to 1"),
        ("kind: merge\ninputs: [{ref: a}]\nmethod: {name: ties}", "rank", "full rank"),
        ("kind: merge\ninputs: [{ref: a}]\noutput: {dtype: int8}", "output.dtype", "'float16'"),
        ("kind: merge\ninputs: [{ref: a}]\nschema: 2", "schema", "1"),
        ("kind: bake\ninputs: [{ref: a}]", "base", "needs the checkpoint"),
        ("kind: bake\ninputs: [{ref: a}]\nbase: {ref: b}\nrank: {fixed: 2}", "rank", "no factors"),
        ("kind: bake\ninputs: [{ref: a}]\nbase: {ref: b}\noutput: {dtype: float16}", "output", "keep"),
        ("kind: merge\nkind: bake", "", "'kind' is said twice"),
        ('{"kind": "merge", "kind": "bake"}', "", "'kind' is said twice"),
        ("a: &x [1]\nb: *x", "", "aliases"),
        ("[" * 5000, "", "recursion"),
        ("? [a]\n: b", "", "unhashable"),
        ("kind: merge\ninputs: [{ref: 2020-01-01}]", "", "date"),
        ("just words", "", "recipe: Input should be an object"),
        ("inputs:\n- [1", "", "YAML nor JSON: expected ',' or ']', but got '<stream end>' in line 2"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_at_its_field(text: str, param: str, says: str) -> None:
    with pytest.raises(BadRecipe, match=".*") as caught:
        Recipe.load(text)
    assert caught.value.param == param
    assert says in str(caught.value)


def test_the_digest_covers_content_and_not_names_or_order() -> None:
    recipe = Recipe.load(FULL).pin(PINS)
    renamed = Recipe.load(FULL.replace("ref: ink", "ref: elsewhere/ink")).pin(
        {"elsewhere/ink": PINS["ink"], "robot": PINS["robot"]}
    )
    assert renamed.digest() == recipe.digest()
    swapped = recipe.model_copy(update={"inputs": recipe.inputs[::-1]})
    assert swapped.digest() == recipe.digest()
    assert recipe.digest() == (
        "sha256:" + hashlib.sha256(recipe.canonical_json().encode()).hexdigest()
    )
    assert Recipe.load(recipe.canonical_json()).digest() == recipe.digest()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("strength: 0.7", "strength: 0.71"),
        ("text_encoder: 0.4", "text_encoder: 0.0"),
        ('"*.attn2.*": -1', '"*.attn2.*": 1'),
        ('leave_out: ["text_encoder.*"]', "leave_out: []"),
        ("fixed: 16", "fixed: 17"),
        ("dialect: kohya", "dialect: diffusers"),
        ("dtype: float16", "dtype: float32"),
        ("seed: 0", "seed: 1"),
        ("numerics: fast", "numerics: reproducible"),
    ],
)
def test_everything_that_decides_the_result_changes_the_digest(old: str, new: str) -> None:
    assert old in FULL
    changed = Recipe.load(FULL.replace(old, new)).pin(PINS)
    assert changed.digest() != Recipe.load(FULL).pin(PINS).digest()


def test_defaults_said_or_unsaid_give_one_digest() -> None:
    short = Recipe.load(f"kind: merge\ninputs: [{{sha256: {A}}}]")
    said = Recipe.load(
        f"schema: 1\nkind: merge\ninputs: [{{sha256: {A}, strength: 1, blocks: {{}}}}]\n"
        "method: {name: linear}\nrank: {exact: true}\noutput: {dtype: keep}\nseed: 0"
    )
    assert short.digest() == said.digest()


def test_patterns_give_one_digest_in_any_order_and_however_often_they_are_said() -> None:
    for field in ("leave_out", "only"):
        digests = {
            Recipe.parse({"kind": "merge", "inputs": [{"sha256": A, field: globs}]}).digest()
            for globs in (["a.*", "b.*"], ["b.*", "a.*"], ["a.*", "b.*", "a.*"])
        }
        assert len(digests) == 1


def test_the_digest_needs_every_sha256() -> None:
    with pytest.raises(BadRecipe, match=r"inputs\[1\]\.sha256"):
        Recipe.load(FULL).pin({"ink": PINS["ink"]}).digest()


def test_pinning_refuses_another_file_than_the_one_that_was_meant() -> None:
    pinned = Recipe.load(FULL).pin(PINS)
    assert pinned.pin(PINS) == pinned
    with pytest.raises(BadRecipe, match=r"inputs\[0\]\.sha256.*says a+, but ink is b+"):
        pinned.pin({"ink": Pinned(sha256=B)})
    config = Recipe.load(f"kind: merge\ninputs: [{{ref: ink, config_sha256: {A}}}]")
    with pytest.raises(BadRecipe, match="config_sha256"):
        config.pin({"ink": Pinned(sha256=A, config_sha256=B)})


def test_sources_are_named_by_ref_or_else_by_digest() -> None:
    recipe = Recipe.load(
        f"kind: bake\nbase: {{ref: sd}}\ninputs: [{{ref: ink}}, {{sha256: {B}}}, {{ref: ink}}]"
    )
    assert recipe.refs() == ["sd", "ink", f"sha256:{B}"]


def test_strength_is_the_components_own_times_every_matching_block() -> None:
    ink = Recipe.load(FULL).inputs[0]
    assert ink.strength_at("unet", "down_blocks.0.attn1.to_q") == 0.7
    assert ink.strength_at("text_encoder", "text_model.encoder.layers.0.mlp.fc1") == 0.4
    assert ink.strength_at("unet", "up_blocks.0.attn1.to_q") == 0.7 * 0.5
    assert ink.strength_at("unet", "up_blocks.0.attn2.to_q") == -0.7 * 0.5


def test_a_strength_of_zero_is_zero_and_not_the_default() -> None:
    recipe = Recipe.load("kind: merge\ninputs: [{ref: a, strength: 0, components: {unet: 0}}]")
    assert recipe.inputs[0].strength_at("unet", "x") == 0
    assert recipe.inputs[0].strength_at("text_encoder", "x") == 0


def _example() -> str:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")
    return re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0]


def test_the_example_in_the_documents_is_a_recipe_and_shows_every_field() -> None:
    example = re.sub(r"^base:.*$", "", _example(), flags=re.MULTILINE)
    recipe = Recipe.load(re.sub(r"(config_)?sha256: \S*…", "", example))
    assert recipe.inputs[0].strength == 0.7
    fields = {
        alias or name
        for part in (Recipe, Input, Output)
        for name, alias in ((n, f.alias) for n, f in part.model_fields.items())
    }
    assert not [name for name in fields if f"{name}:" not in _example()]
    text = (Path(__file__).parents[2] / "docs" / "merging.md").read_text("utf-8")
    assert not [name for name in Rank.model_fields if name not in text]


def test_every_method_a_recipe_may_name_is_in_the_table() -> None:
    classes = get_args(get_args(Method)[0])
    named = {get_args(its.model_fields["name"].annotation)[0]: its for its in classes}
    assert named == {name: row.parameters for name, row in METHODS.items()}
    for name, method in METHODS.items():
        assert method.name == name
        assert all(f.description for n, f in method.parameters.model_fields.items() if n != "name")
        assert "http" in method.reference
