"""What a dtype costs, predicted from samples, against what merges and bakes then write."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.errors import NotFinite
from merge.execute import execute
from merge.families import FAMILIES
from merge.formats.hashes import sha256_file
from merge.plan import plan
from merge.recipe import Pinned, Recipe
from merge.reports import storage
from merge.reports.measure import measure
from merge.reports.report import Storage
from tests.fixtures import factors
from tests.fixtures.engine import adaptable, make_adapter, make_recipe, run
from tests.fixtures.families import tiny_family

FAMILY = tiny_family("sd15-tiny")
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


@pytest.fixture(autouse=True)
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, FAMILY.name, FAMILY)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("dialect", "rank"),
    [("diffusers", {"exact": True}), ("kohya", {"exact": True}), ("kohya", {"fixed": 3})],
    ids=str,
)
def test_rounding_of_factors_from_a_sample_is_within_a_tenth(
    dtype: str, rank: dict[str, float], dialect: str, tmp_path: Path
) -> None:
    names = adaptable(FAMILY)[::2]
    assert len(names) > storage.MOST_MODULES
    # Ranks differ, so that one alpha for all of a kohya file scales factors.
    inputs = [
        (make_adapter(tmp_path / f"{i}.safetensors", FAMILY, its, seed=i, rank=i).path, 0.1**i)
        for i, its in ((2, names), (5, names[::3]))
    ]
    fields = {"rank": rank, "output": {"dtype": dtype, "dialect": dialect}}
    found = measure(*make_recipe(inputs, **fields)).storage
    assert found is not None
    assert found.modules == storage.MOST_MODULES
    (asked,) = [rounding for rounding in found.factors if rounding.is_asked]
    certificate = run(tmp_path / "out.safetensors", inputs, **fields).certificate
    assert asked.error == pytest.approx(certificate["rounding"], rel=0.1)
    errors = {rounding.dtype: rounding.error for rounding in found.factors}
    assert 4 < errors["BF16"] / errors["F16"] < 16
    assert not any(rounding.overflows for rounding in found.factors)


def test_rounding_of_factors_of_a_full_rank_change(tmp_path: Path) -> None:
    held = factors.layers("oft")
    base = factors.write_base(tmp_path / "base.safetensors", held)
    path = factors.write_factors(tmp_path / "a.safetensors", "oft", held)
    document = {
        "kind": "merge",
        "inputs": [{"ref": str(path)}],
        "base": {"ref": str(base)},
        "rank": {"fixed": 3},
        "output": {"dtype": "bfloat16"},
    }
    recipe, files = Recipe.parse(document), {str(its): its for its in (path, base)}
    pins = {ref: Pinned(sha256=sha256_file(its)) for ref, its in files.items()}
    found = measure(recipe, files).storage
    assert found is not None
    (asked,) = [rounding for rounding in found.factors if rounding.is_asked]
    outcome = execute(plan(recipe.pin(pins), files), tmp_path / "out")
    assert asked.error == pytest.approx(outcome.certificate["rounding"], rel=0.1)


def test_factors_that_no_half_can_hold_are_said(tmp_path: Path) -> None:
    names = adaptable(FAMILY)[:3]
    one = make_adapter(
        tmp_path / "a.safetensors", FAMILY, names, dtype=torch.float32, size=3e5, alpha=None
    )
    found = measure(*make_recipe([(one.path, 1.0)])).storage
    assert found is not None
    assert {its.dtype: its.overflows for its in found.factors} == {
        "F32": False,
        "F16": True,
        "BF16": False,
    }


N, IN = 6, 256
ROWS = [640, 320, 160, 80, 400, 320]


def write_base(path: Path, dtype: str, *, has_scale: bool) -> Path:
    generator = torch.Generator().manual_seed(5)
    state = {}
    for i in range(N):
        weight = torch.randn(ROWS[i], IN, generator=generator) * 0.03 * (1 + i)
        if has_scale:
            scale = weight.abs().max() / 448
            state[f"blocks.{i}.proj.scale_weight"] = scale.reshape(1)
            weight = weight / scale
        state[f"blocks.{i}.proj.weight"] = weight.to(DTYPES[dtype])
    save_file(state, path)
    return path


def write_adapter(path: Path, size: float) -> Path:
    generator = torch.Generator().manual_seed(6)
    tensors = {}
    for i in range(N):
        stem = f"blocks.{i}.proj"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(4, IN, generator=generator) * size
        tensors[f"{stem}.lora_up.weight"] = torch.randn(ROWS[i], 4, generator=generator) * size
    save_file(tensors, path)
    return path


def meaning(path: Path) -> np.ndarray:
    state = load_file(path)
    found = []
    for i in range(N):
        scale = state.get(f"blocks.{i}.proj.scale_weight", torch.ones(1))
        found.append((state[f"blocks.{i}.proj.weight"].double() * scale.double()).numpy())
    return np.concatenate(found)


def report_of(adapter: Path, base: Path) -> Storage:
    found = measure(*make_recipe([(adapter, 0.5)], base=base)).storage
    assert found is not None
    return found


@pytest.mark.parametrize("size", [0.01, 0.03, 0.1])
@pytest.mark.parametrize(
    ("dtype", "has_scale"),
    [("F16", False), ("BF16", False), ("F8_E4M3", False), ("F8_E4M3", True)],
)
def test_the_loss_of_a_bake_from_a_fifth_of_the_values(
    dtype: str, has_scale: bool, size: float, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base.safetensors", dtype, has_scale=has_scale)
    adapter = write_adapter(tmp_path / "a.safetensors", size)
    found = report_of(adapter, base)
    (own,) = [loss for loss in found.bake if loss.is_base]
    assert own.dtype == dtype
    assert found.values == N * 16 * 1024 == pytest.approx(0.2 * sum(ROWS) * IN, rel=0.01)
    output = {"allow_loss": True} if dtype == "F8_E4M3" else {}
    out = tmp_path / "out.safetensors"
    certificate = run(out, [(adapter, 0.5)], base=base, output=output).certificate
    # Where the largest change makes a scale grow, a little less stays than is predicted.
    allowed = 0.05 if has_scale and size > 0.05 else 0.01
    assert own.unchanged == pytest.approx(certificate["unchanged"], abs=allowed)
    state = load_file(adapter)
    wanted = 0.5 * np.concatenate(
        [
            (
                state[f"blocks.{i}.proj.lora_up.weight"].double()
                @ state[f"blocks.{i}.proj.lora_down.weight"].double()
            ).numpy()
            for i in range(N)
        ]
    )
    arrived = meaning(out) - meaning(base)
    gain = (arrived * wanted).sum() / (wanted**2).sum()
    assert own.gain == pytest.approx(gain, abs=0.03)
    if "gain" in certificate:
        assert own.gain == pytest.approx(certificate["gain"], abs=0.03)
    error = np.sqrt(((arrived - wanted) ** 2).sum() / (wanted**2).sum())
    assert own.error == pytest.approx(error, rel=0.05)
    change = np.sqrt((wanted**2).sum() / (meaning(base) ** 2).sum())
    assert found.relative_change == pytest.approx(change, rel=0.05)


def test_what_another_dtype_of_the_base_would_lose_is_what_it_loses(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a.safetensors", 0.03)
    of_float32 = report_of(adapter, write_base(tmp_path / "F32", "F32", has_scale=False))
    for loss in of_float32.bake:
        base = write_base(tmp_path / loss.dtype, loss.dtype, has_scale=False)
        (own,) = [its for its in report_of(adapter, base).bake if its.is_base]
        assert (own.gain, own.error, own.unchanged) == pytest.approx(
            (loss.gain, loss.error, loss.unchanged), rel=1e-5
        )
    errors = {loss.dtype: loss.error for loss in of_float32.bake}
    assert list(errors) == ["F32", "F16", "BF16", "F8_E4M3"]
    assert errors["F32"] < errors["F16"] < errors["BF16"] < errors["F8_E4M3"]


@pytest.mark.parametrize(
    ("part", "value"),
    [("weight", float("nan")), ("scale_weight", float("nan")), ("scale_weight", float("inf"))],
)
def test_a_base_that_is_not_finite_is_refused_by_name(
    part: str, value: float, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base.safetensors", "F8_E4M3", has_scale=True)
    state = load_file(base)
    key = f"blocks.1.proj.{part}"
    state[key] = torch.full_like(state[key].float(), value).to(state[key].dtype)
    save_file(state, base)
    adapter = write_adapter(tmp_path / "a.safetensors", 0.1)
    with pytest.raises(NotFinite, match=f"base.safetensors: {key} holds NaN or Inf"):
        report_of(adapter, base)


def test_a_weight_too_large_for_a_dtype_is_said_and_left_out(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors", "BF16", has_scale=False)
    adapter = write_adapter(tmp_path / "a.safetensors", 0.1)
    before = {loss.dtype: loss for loss in report_of(adapter, base).bake}
    assert not any(loss.overflows for loss in before.values())
    state = load_file(base)
    state["blocks.1.proj.weight"].fill_(1e5)  # float16 ends at 65504
    save_file(state, base)
    found = {loss.dtype: loss for loss in report_of(adapter, base).bake}
    assert {dtype for dtype, loss in found.items() if loss.overflows} == {"F16"}
    for loss in found.values():
        assert np.isfinite([loss.gain, loss.error, loss.unchanged]).all()
    assert found["F16"].gain == pytest.approx(before["F16"].gain, abs=1e-3)


def test_zeros_of_scale_0_are_numbers_like_any_other(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors", "F8_E4M3", has_scale=True)
    state = load_file(base)
    for part in ("weight", "scale_weight"):
        state[f"blocks.1.proj.{part}"] = torch.zeros_like(state[f"blocks.1.proj.{part}"])
    save_file(state, base)
    found = report_of(write_adapter(tmp_path / "a.safetensors", 0.1), base)
    for loss in found.bake:
        assert not loss.overflows
        assert np.isfinite([loss.gain, loss.error, loss.unchanged]).all()
