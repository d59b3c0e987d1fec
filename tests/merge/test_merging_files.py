"""Adapters merged from real files into real files, against dense float64 references."""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge.errors import (
    BadRecipe,
    CannotWrite,
    MissingKeys,
    NotFinite,
    Overflow,
    ShapeMismatch,
    UnknownKeys,
    UnknownModules,
    Unsupported,
)
from merge.execute import Cancelled, execute
from merge.families import FAMILIES, Family
from merge.formats.hashes import sha256_file
from merge.plan import MergePlan, plan
from merge.recipe import Recipe
from tests.fixtures.engine import (
    Array,
    MadeAdapter,
    Name,
    load_deltas,
    make_adapter,
    make_recipe,
    run,
    some_of,
)
from tests.fixtures.families import tiny_family
from tests.oracles import linear as oracle

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Unit roundoff of each dtype: the largest relative error of one rounding.
ROUNDOFF = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}


@pytest.fixture(params=["sd15-tiny", "sdxl-tiny"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Family:
    found = tiny_family(request.param)
    monkeypatch.setitem(FAMILIES, found.name, found)
    return found


@pytest.fixture
def sd15(monkeypatch: pytest.MonkeyPatch) -> Family:
    found = tiny_family("sd15-tiny")
    monkeypatch.setitem(FAMILIES, found.name, found)
    return found


def _dense(made: list[MadeAdapter], strengths: list[float]) -> dict[Name, Array]:
    names = sorted({name for adapter in made for name in adapter.deltas})
    return {
        name: oracle.merged(
            [a.deltas[name] for a in made if name in a.deltas],
            [s for a, s in zip(made, strengths, strict=True) if name in a.deltas],
        )
        for name in names
    }


def _relative(found: dict[Name, Array], wanted: dict[Name, Array]) -> float:
    """Frobenius norm of the difference over all modules, relative to what was wanted."""
    assert found.keys() == wanted.keys()
    wrong = sum(np.sum((found[name] - wanted[name]) ** 2) for name in wanted)
    return float(np.sqrt(wrong / sum(np.sum(m**2) for m in wanted.values())))


@pytest.mark.parametrize("numerics", ["fast", "reproducible"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exact_merge_is_the_weighted_sum(
    family: Family, dtype: torch.dtype, numerics: str, tmp_path: Path
) -> None:
    names = some_of(family)
    made = [
        make_adapter(tmp_path / "a.safetensors", family, names, rank=3, alpha=1.0, dtype=dtype),
        # Another rank, no alpha, fewer modules, other values.
        make_adapter(
            tmp_path / "b.safetensors", family, names[2:], rank=5, alpha=None, dtype=dtype, seed=2
        ),
        make_adapter(
            tmp_path / "c.safetensors", family, names[:-2], rank=1, alpha=7.0, dtype=dtype, seed=3
        ),
    ]
    strengths = [0.7, -0.5, 1.3]
    out = tmp_path / "out.safetensors"
    outcome = run(
        out, [(a.path, s) for a, s in zip(made, strengths, strict=True)], numerics=numerics
    )
    stored = outcome.certificate["dtype"]
    found, wanted = load_deltas(out, family, names), _dense(made, strengths)
    assert found.keys() == wanted.keys()
    for name in wanted:
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(
            found[name] / scale, wanted[name] / scale, rtol=0, atol=8 * ROUNDOFF[stored]
        )
    assert outcome.certificate["truncation"] == 0
    assert outcome.certificate["rounding"] == pytest.approx(
        _relative(found, wanted), rel=1e-3, abs=1e-6
    )
    assert {m["rank"] for m in outcome.certificate["modules"].values()} <= {1, 3, 4, 5, 6, 8, 9}


@pytest.mark.parametrize("rank", [1, 4, 8, 1000])
@pytest.mark.parametrize("numerics", ["fast", "reproducible"])
def test_a_merge_at_a_rank_is_the_nearest_one(
    family: Family, rank: int, numerics: str, tmp_path: Path
) -> None:
    names = some_of(family)
    made = [
        make_adapter(tmp_path / "a.safetensors", family, names, rank=6, dtype=torch.float32),
        make_adapter(
            tmp_path / "b.safetensors", family, names, rank=9, dtype=torch.float32, seed=2
        ),
    ]
    strengths = [0.7, -0.5]
    out = tmp_path / "out.safetensors"
    outcome = run(
        out,
        [(a.path, s) for a, s in zip(made, strengths, strict=True)],
        rank={"fixed": rank},
        numerics=numerics,
    )
    dense = _dense(made, strengths)
    found = load_deltas(out, family, names)
    wanted = {
        name: oracle.nearest(m.reshape(len(m), -1), rank).reshape(m.shape)
        for name, m in dense.items()
    }
    assert _relative(found, wanted) < 1e-5
    modules = outcome.certificate["modules"]
    for (component, module), m in dense.items():
        claimed = modules[f"{component}.{module}"]
        matrix = m.reshape(len(m), -1)
        assert claimed["rank"] == min(rank, 15, *matrix.shape)
        assert claimed["truncation"] == pytest.approx(
            oracle.relative_error(matrix, rank), rel=1e-3, abs=1e-6
        )
        assert claimed["norm"] == pytest.approx(np.linalg.norm(matrix), rel=1e-3)
    assert outcome.certificate["error"] == pytest.approx(
        _relative(found, dense), rel=1e-3, abs=1e-6
    )


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_energy_keeps_its_share_in_every_module(
    sd15: Family, energy: float, tmp_path: Path
) -> None:
    names = some_of(sd15)
    made = [
        make_adapter(tmp_path / "a.safetensors", sd15, names, rank=6, dtype=torch.float32),
        make_adapter(tmp_path / "b.safetensors", sd15, names, rank=5, dtype=torch.float32, seed=2),
    ]
    out = tmp_path / "out.safetensors"
    outcome = run(out, [(a.path, 1.0) for a in made], rank={"energy": energy})
    for (component, module), m in _dense(made, [1.0, 1.0]).items():
        rank = outcome.certificate["modules"][f"{component}.{module}"]["rank"]
        kept = np.cumsum(oracle.values(m.reshape(len(m), -1)) ** 2)
        kept = kept / kept[-1]
        assert kept[rank - 1] >= energy - 1e-6
        assert rank == 1 or kept[rank - 2] < energy
    assert outcome.certificate["truncation"] ** 2 <= 1 - energy + 1e-6


def test_a_budget_is_kept_and_beats_one_rank_for_all(sd15: Family, tmp_path: Path) -> None:
    names = some_of(sd15)
    made = [
        make_adapter(tmp_path / "a.safetensors", sd15, names, rank=6, dtype=torch.float32),
        make_adapter(tmp_path / "b.safetensors", sd15, names, rank=6, dtype=torch.float32, seed=2),
    ]
    inputs = [(a.path, 1.0) for a in made]
    uniform = run(tmp_path / "uniform.safetensors", inputs, rank={"fixed": 4})
    size = _data_bytes(tmp_path / "uniform.safetensors")
    best = run(tmp_path / "best.safetensors", inputs, rank={"budget_bytes": size})
    assert _data_bytes(tmp_path / "best.safetensors") <= size
    assert best.certificate["truncation"] < uniform.certificate["truncation"]
    found = load_deltas(tmp_path / "best.safetensors", sd15, names)
    dense = _dense(made, [1.0, 1.0])
    for name in dense.keys() - found.keys():
        found[name] = np.zeros_like(dense[name])
    assert _relative(found, dense) == pytest.approx(best.certificate["error"], rel=1e-3)


def test_a_budget_drops_the_layers_that_do_least(sd15: Family, tmp_path: Path) -> None:
    names = some_of(sd15)
    made = make_adapter(tmp_path / "a.safetensors", sd15, names, dtype=torch.float32)
    out = tmp_path / "out.safetensors"
    outcome = run(out, [(made.path, 1.0)], rank={"budget_bytes": _data_bytes(made.path) // 10})
    found = load_deltas(out, sd15, names)
    assert 0 < len(found) < len(names)
    dropped = {name: np.zeros_like(made.deltas[name]) for name in made.deltas.keys() - found.keys()}
    error = _relative(found | dropped, made.deltas)
    assert error == pytest.approx(outcome.certificate["error"], rel=1e-3)


def _data_bytes(path: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(path).values())


def test_a_budget_too_small_for_anything_is_refused(sd15: Family, tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    with pytest.raises(BadRecipe, match=r"rank\.budget_bytes: the smallest module needs \d+ bytes"):
        plan(*make_recipe([(made.path, 1.0)], rank={"budget_bytes": 10}))


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
def test_every_dialect_means_the_same_change(family: Family, dialect: str, tmp_path: Path) -> None:
    names = [name for name in some_of(family) if dialect != "peft" or name[0] == "unet"]
    (tmp_path / dialect).mkdir()
    path = tmp_path / dialect / "adapter_model.safetensors"
    made = make_adapter(path, family, names, alpha=6.0, dialect=dialect)
    out = tmp_path / "out.safetensors"
    run(out, [(made.path, -0.5)], output={"dialect": "kohya", "dtype": "float32"})
    found = load_deltas(out, family, names)
    assert _relative(found, {n: -0.5 * d for n, d in made.deltas.items()}) < 1e-6


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "comfy"])
def test_what_is_written_in_a_dialect_reads_back(
    family: Family, dialect: str, tmp_path: Path
) -> None:
    names = some_of(family)
    made = make_adapter(tmp_path / "a.safetensors", family, names, rank=3, alpha=1.0)
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    run(there, [(made.path, 1.0)], output={"dialect": dialect, "dtype": "float32"})
    run(back, [(there, 1.0)], output={"dialect": "kohya", "dtype": "float32"})
    assert _relative(load_deltas(back, family, names), made.deltas) < 1e-6


def test_a_peft_adapter_is_written_as_a_folder(sd15: Family, tmp_path: Path) -> None:
    names = [name for name in some_of(sd15) if name[0] == "unet"]
    made = make_adapter(tmp_path / "a.safetensors", sd15, names, rank=3, alpha=1.0)
    out, back = tmp_path / "peft", tmp_path / "back.safetensors"
    run(out, [(made.path, 1.0)], output={"dialect": "peft", "dtype": "float32"})
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3.0)
    weights = out / "adapter_model.safetensors"
    run(back, [(weights, 1.0)], output={"dialect": "kohya", "dtype": "float32"})
    assert _relative(load_deltas(back, sd15, names), made.deltas) < 1e-6


def test_peft_refuses_two_models_in_one_adapter(sd15: Family, tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    with pytest.raises(BadRecipe, match=r"output\.dialect: peft holds one model"):
        plan(*make_recipe([(made.path, 1.0)], output={"dialect": "peft"}))


def _plan(*args: object, **fields: object) -> MergePlan:
    planned = plan(*make_recipe(*args, **fields))  # type: ignore[arg-type]
    assert isinstance(planned, MergePlan)
    return planned


def test_the_outputs_dtype_and_dialect_do_not_depend_on_the_order(
    sd15: Family, tmp_path: Path
) -> None:
    names = [name for name in some_of(sd15) if name[0] == "unet"]
    kinds = {
        "half": (torch.float16, "kohya"),
        "brain": (torch.bfloat16, "kohya"),
        "single": (torch.float32, "diffusers"),
    }
    paths = {}
    for name, (dtype, dialect) in kinds.items():
        paths[name] = tmp_path / f"{name}.safetensors"
        make_adapter(paths[name], sd15, names, dtype=dtype, dialect=dialect)
    wanted = {
        ("half",): ("F16", "kohya"),
        ("brain",): ("BF16", "kohya"),
        ("single",): ("F32", "diffusers"),
        ("half", "brain"): ("F32", "kohya"),
        ("half", "single"): ("F32", "kohya"),
        ("half", "brain", "single"): ("F32", "kohya"),
    }
    for chosen, (dtype, dialect) in wanted.items():
        for order in permutations(chosen):
            planned = _plan([(paths[name], 1.0) for name in order])
            assert (planned.dtype, planned.dialect) == (dtype, dialect)


def test_one_adapter_at_strength_one_keeps_its_factors(sd15: Family, tmp_path: Path) -> None:
    names = some_of(sd15)
    made = make_adapter(tmp_path / "a.safetensors", sd15, names, rank=4, alpha=4.0)
    run(tmp_path / "out.safetensors", [(made.path, 1.0)])
    before, after = load_file(made.path), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key].to(before[key].dtype)) for key in before)


@pytest.mark.parametrize("rank", [{"exact": True}, {"fixed": 5}, {"energy": 0.9}])
def test_order_of_inputs_changes_no_byte(
    sd15: Family, rank: dict[str, object], tmp_path: Path
) -> None:
    names = some_of(sd15)
    inputs = [
        (make_adapter(tmp_path / f"{i}.safetensors", sd15, names, rank=i + 2, seed=i).path, 0.3 * i)
        for i in range(1, 4)
    ]
    found = set()
    for number, order in enumerate(permutations(inputs)):
        out = tmp_path / f"out{number}.safetensors"
        found.add(run(out, list(order), rank=rank).sha256)
        assert sha256_file(out) in found
    assert len(found) == 1


def test_names_of_inputs_change_no_byte(sd15: Family, tmp_path: Path) -> None:
    ink = make_adapter(tmp_path / "ink.safetensors", sd15, some_of(sd15)).path
    other = tmp_path / "another name.safetensors"
    other.write_bytes(ink.read_bytes())
    found = {
        run(tmp_path / f"{n}.safetensors", [(p, 0.5)]).sha256 for n, p in enumerate((ink, other))
    }
    assert len(found) == 1


@pytest.mark.parametrize("numerics", ["fast", "reproducible"])
def test_any_number_of_threads_gives_the_same_bytes(
    sd15: Family, numerics: str, tmp_path: Path
) -> None:
    names = some_of(sd15)
    inputs = [
        (make_adapter(tmp_path / f"{i}.safetensors", sd15, names, seed=i).path, 0.5)
        for i in range(2)
    ]
    found = {
        run(
            tmp_path / f"out{workers}.safetensors",
            inputs,
            workers=workers,
            rank={"fixed": 3},
            numerics=numerics,
        ).sha256
        for workers in (1, 2, 5)
    }
    assert len(found) == 1


def test_strengths_of_components_and_blocks_reach_their_modules(
    sd15: Family, tmp_path: Path
) -> None:
    names = some_of(sd15)
    made = make_adapter(tmp_path / "a.safetensors", sd15, names, dtype=torch.float32)
    source = {
        "ref": str(made.path),
        "strength": 0.7,
        "components": {"text_encoder": 0.4},
        "blocks": {"*.attn1.*": -2.0, "*.to_q": 0.0, "unet.*.conv1": 0.5},
    }
    outcome = run(tmp_path / "out.safetensors", [source])
    found = load_deltas(tmp_path / "out.safetensors", sd15, names)
    for (component, module), change in made.deltas.items():
        strength = 0.4 if component == "text_encoder" else 0.7
        strength *= -2.0 if ".attn1." in module else 1.0
        strength *= 0.5 if module.endswith(".conv1") else 1.0
        if module.endswith(".to_q"):
            # A module with strength 0 is dropped, not written as zeros.
            assert (component, module) not in found
            assert f"{component}.{module}" not in outcome.certificate["modules"]
            continue
        np.testing.assert_allclose(found[component, module], strength * change, atol=1e-6)


def test_what_a_recipe_leaves_out_is_named_in_the_output(sd15: Family, tmp_path: Path) -> None:
    names = some_of(sd15)
    made = make_adapter(tmp_path / "a.safetensors", sd15, names)
    out = tmp_path / "out.safetensors"
    run(out, [{"ref": str(made.path), "leave_out": ["text_encoder.*"]}])
    assert all(name[0] == "unet" for name in load_deltas(out, sd15, names))
    with safe_open(out, framework="pt") as file:
        left_out = json.loads(file.metadata()["graft.certificate"])["left_out"]
    assert left_out == sorted(f"{c}.{m}" for c, m in names if c == "text_encoder")


def test_the_output_says_where_it_comes_from(sd15: Family, tmp_path: Path) -> None:
    names = some_of(sd15)
    ink = make_adapter(
        tmp_path / "ink.safetensors",
        sd15,
        names,
        rank=4,
        metadata={"modelspec.trigger_phrase": "inkstyle", "ss_base_model_version": "sd_v1"},
    )
    robot = make_adapter(
        tmp_path / "robot.safetensors",
        sd15,
        names,
        seed=2,
        metadata={"graft.triggers": '["robo, bot"]', "ss_base_model_version": "sd_v1"},
    )
    out = tmp_path / "out.safetensors"
    outcome = run(out, [(ink.path, 0.7), (robot.path, 0.5)], rank={"fixed": 4})
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    recipe = Recipe.load(metadata["graft.recipe"])
    assert recipe.digest() == metadata["graft.recipe_digest"] == outcome.recipe_digest
    assert {(i.sha256, i.strength) for i in recipe.inputs} == {
        (sha256_file(ink.path), 0.7),
        (sha256_file(robot.path), 0.5),
    }
    assert json.loads(metadata["graft.certificate"]) == outcome.certificate
    assert set(json.loads(metadata["graft.triggers"])) == {"inkstyle", "robo, bot"}
    assert set(metadata["modelspec.merged_from"].split(", ")) == {
        f"sha256:{sha256_file(ink.path)}",
        f"sha256:{sha256_file(robot.path)}",
    }
    assert metadata["modelspec.architecture"] == f"{sd15.architecture}/lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4")
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert str(tmp_path) not in json.dumps(metadata)


def test_a_recipe_in_an_output_rebuilds_it(sd15: Family, tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    out = tmp_path / "out.safetensors"
    outcome = run(out, [(made.path, 0.7)], rank={"fixed": 2}, numerics="reproducible")
    with safe_open(out, framework="pt") as file:
        recipe = Recipe.load(file.metadata()["graft.recipe"])
    (name,) = recipe.refs()
    again = execute(plan(recipe, {name: made.path}), tmp_path / "again.safetensors")
    assert again.sha256 == outcome.sha256


@pytest.mark.parametrize(("rank", "passes"), [({"exact": True}, 1), ({"budget_bytes": 10**6}, 2)])
def test_progress_counts_every_module(
    sd15: Family, rank: dict[str, object], passes: int, tmp_path: Path
) -> None:
    names = some_of(sd15)
    made = make_adapter(tmp_path / "a.safetensors", sd15, names)
    seen: list[tuple[int, int]] = []
    planned = plan(*make_recipe([(made.path, 1.0)], rank=rank))
    execute(planned, tmp_path / "o.safetensors", lambda *step: seen.append(step))
    total = passes * len(names)
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_cancelling_leaves_nothing(sd15: Family, tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    asked = iter([False, False, True, True, True, True])
    with pytest.raises(Cancelled):
        execute(
            plan(*make_recipe([(made.path, 1.0)])),
            tmp_path / "out.safetensors",
            cancelled=lambda: next(asked),
        )
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_two_families_do_not_merge(
    sd15: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sdxl = tiny_family("sdxl-tiny")
    monkeypatch.setitem(FAMILIES, sdxl.name, sdxl)
    one = make_adapter(tmp_path / "one.safetensors", sd15, some_of(sd15))
    two = make_adapter(tmp_path / "two.safetensors", sdxl, some_of(sdxl))
    with pytest.raises(BadRecipe, match=r"inputs\[[01]\]: .* is for Stable Diffusion .* but "):
        plan(*make_recipe([(one.path, 1.0), (two.path, 1.0)]))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"components": {"text_encoder_2": 1.0}}, r"components\.text_encoder_2: matches no module"),
        ({"blocks": {"*.atn1.*": 1.0}}, r"blocks\.\*\.atn1\.\*: matches no module"),
        ({"strength": 0}, "inputs: every module has strength 0"),
        ({"strength": 0.5, "blocks": {"*": 0.0}}, "inputs: every module has strength 0"),
        ({"leave_out": ["*"]}, "inputs: every module is left out"),
        ({"leave_out": ["*.atn1.*"]}, r"leave_out\.\*\.atn1\.\*: matches no module"),
        ({"ref": "/no/such/file"}, r"inputs\[0\]: /no/such/file was not found"),
    ],
)
def test_an_impossible_wish_is_refused_at_its_field(
    sd15: Family, source: dict[str, object], says: str, tmp_path: Path
) -> None:
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    recipe = Recipe.parse({"kind": "merge", "inputs": [{"ref": str(made.path), **source}]})
    with pytest.raises(BadRecipe, match=says):
        plan(recipe, {str(made.path): made.path})


def test_a_folder_is_no_adapter(tmp_path: Path) -> None:
    recipe = Recipe.parse({"kind": "merge", "inputs": [{"ref": "x"}]})
    with pytest.raises(BadRecipe, match=r"inputs\[0\]: x is a folder, not an adapter file"):
        plan(recipe, {"x": tmp_path})


def _edited(path: Path, change: dict[str, torch.Tensor | None]) -> Path:
    tensors = {key: value for key, value in load_file(path).items() if key not in change}
    tensors |= {key: value for key, value in change.items() if value is not None}
    edited = path.with_name("edited.safetensors")
    save_file(tensors, edited)
    return edited


STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"mystery": torch.zeros(1)}, UnknownKeys, "mystery"),
        ({f"{STEM}.lora_up.weight": None}, MissingKeys, "up"),
        ({f"{STEM}.lora_up.weight": torch.zeros(32, 3)}, ShapeMismatch, "rank 3"),
        ({f"{STEM}.dora_scale": torch.zeros(32, 1)}, Unsupported, "dora"),
        (
            {"lora_unet_x_q.lora_down.weight": torch.zeros(4, 8),
             "lora_unet_x_q.lora_up.weight": torch.zeros(8, 4)},
            UnknownModules, "x_q",
        ),
        ({f"{STEM}.lora_up.weight": torch.zeros(32, 4, dtype=torch.int8)}, Unsupported, "I8"),
    ],
)  # fmt: skip
def test_a_file_with_anything_that_does_not_belong_is_refused_when_planned(
    sd15: Family,
    change: dict[str, torch.Tensor | None],
    error: type[Exception],
    says: str,
    tmp_path: Path,
) -> None:
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    edited = _edited(made.path, change)
    with pytest.raises(error, match=says):
        plan(*make_recipe([(edited, 1.0)]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("role", ["lora_up.weight", "lora_down.weight", "alpha"])
def test_nan_and_inf_are_named_and_nothing_is_left(
    sd15: Family, value: float, role: str, tmp_path: Path
) -> None:
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    broken = load_file(made.path)[f"{STEM}.{role}"].clone()
    broken.view(-1)[0] = value
    edited = _edited(made.path, {f"{STEM}.{role}": broken})
    out = tmp_path / "out.safetensors"
    with pytest.raises(NotFinite, match=f"{STEM}.{role} holds NaN or Inf"):
        run(out, [(edited, 1.0)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "edited.safetensors"]


def test_a_value_too_large_for_the_outputs_dtype_is_refused(sd15: Family, tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15), dtype=torch.float32)
    inputs = [(made.path, 1e12)]
    with pytest.raises(Overflow, match="does not fit F16; a wider dtype"):
        run(tmp_path / "out.safetensors", inputs, output={"dtype": "float16"})
    assert not (tmp_path / "out.safetensors").exists()
    run(tmp_path / "out.safetensors", inputs, output={"dtype": "float32"})


def test_an_input_is_never_written_over(sd15: Family, tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    before = made.path.read_bytes()
    with pytest.raises(CannotWrite, match="is an input of the recipe itself"):
        run(made.path, [(made.path, 1.0)])
    assert made.path.read_bytes() == before


def test_targets_that_cannot_be_written_are_refused_before_work(
    sd15: Family, tmp_path: Path
) -> None:
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    with pytest.raises(CannotWrite, match="does not exist"):
        run(tmp_path / "no" / "out.safetensors", [(made.path, 1.0)])
    with pytest.raises(CannotWrite, match="a folder of this name exists"):
        run(tmp_path, [(made.path, 1.0)])


def test_an_older_file_at_the_target_is_replaced(sd15: Family, tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "a.safetensors", sd15, some_of(sd15))
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    assert run(out, [(made.path, 1.0)]).sha256 == sha256_file(out)
    assert len(load_file(out)) > 0


def test_an_adapter_that_was_never_trained_merges_to_zero(sd15: Family, tmp_path: Path) -> None:
    names = some_of(sd15)
    made = make_adapter(tmp_path / "a.safetensors", sd15, names, zero_up=True)
    for rank in ({"exact": True}, {"fixed": 2}, {"energy": 0.9}):
        outcome = run(tmp_path / "out.safetensors", [(made.path, 1.0)], rank=rank)
        assert outcome.certificate["error"] == 0
        found = load_deltas(tmp_path / "out.safetensors", sd15, names)
        assert all(not change.any() for change in found.values())
    with pytest.raises(BadRecipe, match="nothing to write"):
        run(tmp_path / "o2.safetensors", [(made.path, 1.0)], rank={"budget_bytes": 10**6})


def test_an_adapter_and_its_negative_cancel(sd15: Family, tmp_path: Path) -> None:
    names = some_of(sd15)
    made = make_adapter(tmp_path / "a.safetensors", sd15, names)
    run(tmp_path / "out.safetensors", [(made.path, 0.8), (made.path, -0.8)])
    found = load_deltas(tmp_path / "out.safetensors", sd15, names)
    assert max(np.abs(change).max() for change in found.values()) < 1e-6
