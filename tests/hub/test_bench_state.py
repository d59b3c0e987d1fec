"""The bench in an address, in a form and as a recipe."""

from typing import Any

import pytest
from starlette.datastructures import ImmutableMultiDict, QueryParams

from hub.web.bench_state import METHODS, RANKS, Bench, Row, methods, read
from merge.errors import BadRecipe
from merge.method_parameters import Space
from merge.recipe import Recipe


def at(query: str) -> Bench:
    return read(QueryParams(query))


@pytest.mark.parametrize(
    "query",
    [
        "",
        "add=a/ink=0.7&add=a/robot:x=y.safetensors=-0.5",
        "add=a/ink=0.7,0.4",
        "add=a/ink=1&method=ties&with.density=0.4&with.vote=count&rank=shared:8",
        "add=a/ink=1&method=della&with.elect=false&rank=fixed:16",
        "add=a/ink=1&rank=budget_bytes:1000&base=a/sd15&dialect=peft&dtype=float16&repo=b/c&path=d",
    ],
)
def test_an_address_gives_the_bench_that_it_was_made_of(query: str) -> None:
    bench = at(query)
    assert read(QueryParams(bench.address().partition("?")[2])) == bench
    assert bench.address() == ("/bench?" if query else "/bench") + query


def test_a_form_and_an_address_say_the_same() -> None:
    form = [("ref", "a/ink"), ("strength", "0.7"), ("text", "0.2"), ("ref", "a/robot")]
    form += [("strength", ""), ("text", ""), ("add", "a/cat=2"), ("method", "linear")]
    form += [("rank", "fixed"), ("amount", "4"), ("rank_was", "fixed"), ("with.normalise", "")]
    bench = read(ImmutableMultiDict(form))
    assert bench == at("add=a/ink=0.7,0.2&add=a/robot=1&add=a/cat=2&rank=fixed:4")
    less = read(ImmutableMultiDict([*form, ("drop", "1")]))
    assert [row.ref for row in less.rows] == ["a/ink", "a/cat"]


def test_what_belongs_to_another_choice_is_dropped() -> None:
    kept = at("add=a/ink&method=ties&with.density=0.4&with.epsilon=0.3")
    assert kept.parameters == {"density": "0.4"}
    form = [("ref", "a/ink"), ("rank", "energy"), ("amount", "16"), ("rank_was", "fixed")]
    assert read(ImmutableMultiDict(form)).amount == "0.99"


def test_a_recipe_says_what_the_bench_says() -> None:
    bench = at(
        "add=a/ink=0.7,0.4&add=a/robot=2&method=ties&with.density=0.4&rank=shared:8"
        "&dialect=kohya&base=a/sd15"
    )
    recipe = Recipe.parse(bench.recipe({"a/ink": ("text_encoder", "text_encoder_2")}))
    assert recipe.model_dump(mode="json", exclude_defaults=True) == {
        "kind": "merge",
        "base": {"ref": "a/sd15"},
        "inputs": [
            {
                "ref": "a/ink",
                "strength": 0.7,
                "components": {"text_encoder": 0.4, "text_encoder_2": 0.4},
            },
            {"ref": "a/robot", "strength": 2.0},
        ],
        "method": {"name": "ties", "density": 0.4},
        "rank": {"shared": 8},
        "output": {"dialect": "kohya"},
    }


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("add=a/ink=much", "inputs[0].strength"),
        ("add=a/ink&method=best", "method.name"),
        ("add=a/ink&method=ties&with.density=2", "method.density"),
        ("add=a/ink&method=dare&with.elect=maybe", "method.elect"),
        ("add=a/ink&rank=fixed:many", "rank.fixed"),
        ("", "inputs"),
    ],
)
def test_what_a_person_typed_is_refused_by_its_field(query: str, param: str) -> None:
    with pytest.raises(BadRecipe) as refused:
        Recipe.parse(at(query).recipe({}))
    assert refused.value.param == param


@pytest.mark.parametrize("name", methods())
def test_every_method_can_be_chosen(name: str) -> None:
    bench = at(f"add=a/ink=1&add=a/robot=1&method={name}")
    assert name in METHODS
    assert Recipe.parse(bench.recipe({})).method.model_dump()["name"] == name
    assert bench.is_full == (methods()[name].space is Space.ELEMENTS)
    said = {choice.field: choice.value for choice in bench.choices()}
    assert set(said) == {f"with.{field}" for field in methods()[name].model_fields} - {"with.name"}
    spoken = read(QueryParams([("add", "a/ink"), ("method", name), *said.items()]))
    assert spoken.parameters == {}


@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_can_be_chosen(rank: str) -> None:
    document: dict[str, Any] = at(f"add=a/ink&rank={rank}").recipe({})
    said = Recipe.parse(document).rank.model_dump(exclude_none=True)
    assert list(said) == [rank]


def test_an_adapter_is_on_the_bench_once() -> None:
    bench = Bench().with_adapter("a/ink").with_adapter("a/robot").with_adapter("a/ink")
    assert bench.rows == (Row("a/ink"), Row("a/robot"))
