"""fp8 bases: scale-aware, rounded to the nearest, with the loss said, and refused where it is large."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.bake import bake
from merge.blocks import Options
from merge.errors import BadCheckpoint, BadRecipe, NotFinite, Overflow
from merge.plan import BakePlan, plan
from tests.fixtures.engine import make_recipe, run
from tests.oracles import fp8

DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
LIMITS = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
OUT, IN = 200, 144  # two blocks of 128 each way, the last ones cut
KEY = "blocks.0.proj.weight"
ALLOWED = {"allow_loss": True}

State = dict[str, torch.Tensor]


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _scaled(dtype: str, kind: str) -> tuple[torch.Tensor, State]:
    """A weight as fp8 codes, and the tensors that say its scale."""
    weight = _random(OUT, IN, seed=1) * 0.05
    stored, extra = weight, {}
    stem = KEY.removesuffix(".weight")
    if kind in ("scale_weight", "weight_scale", "comfy"):
        scale = weight.abs().max() / LIMITS[dtype]
        stored = weight / scale
        name = "weight_scale" if kind == "comfy" else kind
        extra[f"{stem}.{name}"] = scale if kind == "comfy" else scale.reshape(1)
    elif kind == "rows":
        scale = weight.abs().amax(1, keepdim=True) / LIMITS[dtype]
        stored, extra[f"{stem}.weight_scale"] = weight / scale, scale
    elif kind == "blocks":
        scale = torch.stack(
            [
                torch.stack([b.abs().max() for b in rows.split(128, 1)])
                for rows in weight.split(128, 0)
            ]
        )
        scale = scale / LIMITS[dtype]
        full = scale.repeat_interleave(128, 0)[:OUT].repeat_interleave(128, 1)[:, :IN]
        stored, extra[f"{stem}.weight_scale_inv"] = weight / full, scale
    if kind == "comfy":
        name = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[dtype]
        text = json.dumps({"format": name}).encode()
        extra[f"{stem}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    return stored.to(DTYPES[dtype]), extra


def _meaning(state: State, dtype: str) -> np.ndarray:
    """The weight a file means, in float64."""
    codes = state[KEY].view(torch.uint8).numpy()
    return fp8.decoded(codes, dtype) * _spread(state)


def _spread(state: State) -> np.ndarray:
    stem = KEY.removesuffix(".weight")
    for name in ("scale_weight", "weight_scale", "weight_scale_inv"):
        if f"{stem}.{name}" in state:
            scale = state[f"{stem}.{name}"].double().numpy()
            if scale.size == 1:
                return np.full((OUT, IN), float(scale.reshape(())))
            if scale.shape[0] == OUT:
                return np.broadcast_to(scale.reshape(OUT, 1), (OUT, IN))
            return np.kron(scale, np.ones((128, 128)))[:OUT, :IN]
    return np.ones((OUT, IN))


def _write(folder: Path, dtype: str, kind: str, size: float = 0.3) -> tuple[Path, Path, np.ndarray]:
    stored, extra = _scaled(dtype, kind)
    other = {"blocks.1.norm.weight": torch.ones(8), "scaled_fp8": torch.zeros(0).to(DTYPES[dtype])}
    save_file({KEY: stored, **extra, **other}, folder / "base.safetensors")
    down, up = _random(4, IN, seed=2) * size, _random(OUT, 4, seed=3) * size
    tensors = {"blocks.0.proj.lora_down.weight": down, "blocks.0.proj.lora_up.weight": up}
    save_file(tensors, folder / "a.safetensors")
    delta = up.double().numpy() @ down.double().numpy()
    return folder / "base.safetensors", folder / "a.safetensors", delta


KINDS = ["plain", "scale_weight", "weight_scale", "rows", "blocks", "comfy"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("numerics", ["fast", "reproducible"])
def test_the_nearest_8_bit_value_of_the_exact_sum(
    kind: str, dtype: str, numerics: str, tmp_path: Path
) -> None:
    base, adapter, delta = _write(tmp_path, dtype, kind)
    out = tmp_path / "out.safetensors"
    outcome = run(out, [(adapter, 0.5)], base=base, numerics=numerics, output=ALLOWED)
    before, after = load_file(base), load_file(out)
    assert list(before) == list(after)
    exact = _meaning(before, dtype) + 0.5 * delta
    codes = after[KEY].view(torch.uint8).numpy()
    # Sums and quotients are rounded to float32: where two codes are equally near, either may come.
    wanted = fp8.nearest(exact / _spread(after), dtype)
    away = np.abs(codes.astype(int) - wanted.astype(int))
    assert away.max() <= 1
    assert (away > 0).mean() < 1e-3
    kept = ((_meaning(after, dtype) - _meaning(before, dtype)) * 0.5 * delta).sum()
    gain = kept / (0.25 * delta**2).sum()
    assert outcome.certificate["gain"] == pytest.approx(gain, rel=1e-3)
    assert outcome.certificate["modules"]["model.blocks.0.proj"]["gain"] == pytest.approx(
        gain, rel=1e-3
    )
    for key in ("blocks.1.norm.weight", "scaled_fp8", "blocks.0.proj.comfy_quant"):
        if key in before:
            assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8))


@pytest.mark.parametrize("kind", ["scale_weight", "rows", "blocks"])
def test_a_scale_is_kept_where_everything_fits_and_else_the_least_that_does(
    kind: str, tmp_path: Path
) -> None:
    base, adapter, delta = _write(tmp_path, "F8_E4M3", kind)
    run(tmp_path / "out.safetensors", [(adapter, 1.0)], base=base, output=ALLOWED)
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    exact, old, new = _meaning(before, "F8_E4M3") + delta, _spread(before), _spread(after)
    grown = new != old
    assert grown.any()
    # Up to 464 the nearest value is 448, the largest.
    assert (np.abs(exact) < new * np.where(grown, 448 * (1 + 1e-6), 464)).all()
    # Where a scale changed, its largest value is at the limit.
    for scale in np.unique(new[grown]):
        largest = np.abs(exact[grown & (new == scale)]).max()
        assert largest / (scale * 448) == pytest.approx(1, abs=1e-5)
    small = tmp_path / "small.safetensors"
    run(small, [(adapter, 1e-5)], base=base, output=ALLOWED)
    untouched = load_file(small)
    assert np.array_equal(_spread(untouched), old)


def test_a_new_scale_is_also_that_of_rows_that_do_not_change(tmp_path: Path) -> None:
    """A LoRA of k alone on a packed tensor with one scale, through OpenCLIP-like packing."""
    base, _, _ = _write(tmp_path, "F8_E4M3", "scale_weight")
    adapter = tmp_path / "rows.safetensors"
    up = torch.zeros(OUT, 4)
    up[:8] = 3.0
    tensors = {
        "blocks.0.proj.lora_down.weight": _random(4, IN, seed=2),
        "blocks.0.proj.lora_up.weight": up,
    }
    save_file(tensors, adapter)
    out = tmp_path / "out.safetensors"
    run(out, [(adapter, 1.0)], base=base, output=ALLOWED)
    before, after = _meaning(load_file(base), "F8_E4M3"), _meaning(load_file(out), "F8_E4M3")
    assert np.unique(_spread(load_file(out))) > 10 * np.unique(_spread(load_file(base)))
    step = 448 * np.unique(_spread(load_file(out))) * 2.0**-5
    assert np.abs(after[8:] - before[8:]).max() < step


def test_a_change_that_would_vanish_is_refused_unless_allowed(tmp_path: Path) -> None:
    base, adapter, _ = _write(tmp_path, "F8_E4M3", "scale_weight", size=0.01)
    out = tmp_path / "out.safetensors"
    with pytest.raises(BadRecipe, match=r"output.allow_loss: \d+% of the change survives"):
        run(out, [(adapter, 1.0)], base=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "base.safetensors"]
    outcome = run(out, [(adapter, 1.0)], base=base, output=ALLOWED)
    assert 0 <= outcome.certificate["gain"] < 0.9


def test_a_change_that_survives_needs_no_permission(tmp_path: Path) -> None:
    base, adapter, _ = _write(tmp_path, "F8_E4M3", "plain", size=3.0)
    outcome = run(tmp_path / "out.safetensors", [(adapter, 1.0)], base=base)
    assert outcome.certificate["gain"] > 0.99


def test_strength_zero_changes_no_byte(tmp_path: Path) -> None:
    base, adapter, _ = _write(tmp_path, "F8_E4M3", "blocks")
    out = tmp_path / "out.safetensors"
    outcome = run(out, [(adapter, 0.0)], base=base)
    before, after = load_file(base), load_file(out)
    assert all(torch.equal(before[k].view(torch.uint8), after[k].view(torch.uint8)) for k in before)
    assert "gain" not in outcome.certificate


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_without_a_scale_a_value_may_be_too_large(dtype: str, tmp_path: Path) -> None:
    base, adapter, _ = _write(tmp_path, dtype, "plain")
    with pytest.raises(Overflow, match=f"does not fit {dtype}"):
        run(tmp_path / "out.safetensors", [(adapter, 1e6)], base=base, output=ALLOWED)


def test_nan_in_an_fp8_base_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = _write(tmp_path, "F8_E4M3", "plain")
    state = load_file(base)
    state[KEY].view(torch.uint8)[3, 3] = 0x7F
    save_file(state, base)
    with pytest.raises(NotFinite, match="holds NaN"):
        run(tmp_path / "out.safetensors", [(adapter, 1.0)], base=base, output=ALLOWED)


def test_nan_is_named_where_it_is_though_its_scale_is_that_of_other_tiles_too(
    tmp_path: Path,
) -> None:
    base, adapter, _ = _write(tmp_path, "F8_E4M3", "scale_weight")
    state = load_file(base)
    state[KEY].view(torch.uint8)[-1, -1] = 0x7F
    save_file(state, base)
    planned = plan(*make_recipe([(adapter, 1.0)], base=base, output=ALLOWED))
    assert isinstance(planned, BakePlan)
    options = Options(1, False, lambda done: None, lambda: False)
    with pytest.raises(NotFinite, match=rf"base.safetensors: {KEY} holds NaN"):
        bake(planned, tmp_path / "out.safetensors", options, tile=IN)


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["scale_weight", "blocks"])
def test_a_scale_that_is_not_finite_is_named(
    kind: str, value: float, method: str, tmp_path: Path
) -> None:
    base, adapter, _ = _write(tmp_path, "F8_E4M3", kind)
    state = load_file(base)
    (key,) = state.keys() & {KEY.replace("weight", name) for name in (kind, "weight_scale_inv")}
    state[key].view(-1)[-1] = value
    save_file(state, base)
    fields: dict[str, Any] = {"method": {"name": method}, "output": ALLOWED}
    with pytest.raises(NotFinite, match=rf"base.safetensors: {key} holds NaN or Inf"):
        run(tmp_path / "out.safetensors", [(adapter, 1.0)], base=base, **fields)
    assert not (tmp_path / "out.safetensors").exists()


def test_rows_of_scale_0_stay_zero_where_nothing_changes_them(tmp_path: Path) -> None:
    """As an all-zero row is quantised without a floor under its scale."""
    base, adapter, _ = _write(tmp_path, "F8_E4M3", "rows")
    state, factors = load_file(base), load_file(adapter)
    scale, up = state["blocks.0.proj.weight_scale"], factors["blocks.0.proj.lora_up.weight"]
    scale[:6], up[:3] = 0.0, 0.0
    state[KEY].view(torch.uint8)[:6] = 0
    save_file(state, base)
    save_file(factors, adapter)
    out = tmp_path / "out.safetensors"
    run(out, [(adapter, 1.0)], base=base, output=ALLOWED)
    after = load_file(out)
    assert (after["blocks.0.proj.weight_scale"][:3] == 0).all()
    down = factors["blocks.0.proj.lora_down.weight"].double().numpy()
    wanted = _meaning(state, "F8_E4M3") + up.double().numpy() @ down
    found = _meaning(after, "F8_E4M3")
    assert not found[:3].any()
    step = np.abs(wanted).max(1, keepdims=True) * 2.0**-4
    assert (np.abs(found - wanted) <= step).all()


def _edited(base: Path, change: dict[str, Any]) -> Path:
    save_file(load_file(base) | change, base)
    return base


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"blocks.0.proj.scale_weight": torch.ones(7)}, r"scales no \(200, 144\)"),
        ({"blocks.0.proj.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
         "says nvfp4"),
        ({"blocks.0.proj.comfy_quant": torch.tensor(list(b"nope"), dtype=torch.uint8)}, "no JSON"),
    ],
)  # fmt: skip
def test_a_scale_that_is_none_is_refused_when_planned(
    change: State, says: str, tmp_path: Path
) -> None:
    base, adapter, _ = _write(tmp_path, "F8_E4M3", "plain")
    with pytest.raises(BadCheckpoint, match=says):
        plan(*make_recipe([(adapter, 1.0)], base=_edited(base, change)))


QUANTISED = {
    "GPTQ or AWQ": {"blocks.0.proj.qweight": torch.zeros(4, 4, dtype=torch.int32)},
    "bitsandbytes": {"blocks.0.proj.weight.absmax": torch.zeros(4)},
    "MLX": {"blocks.0.proj.scales": torch.zeros(4), "blocks.0.proj.biases": torch.zeros(4)},
}


@pytest.mark.parametrize("name", list(QUANTISED))
def test_a_quantised_base_is_refused_by_name(name: str, tmp_path: Path) -> None:
    base, adapter, _ = _write(tmp_path, "F8_E4M3", "plain")
    with pytest.raises(BadCheckpoint, match=f"quantised with {name}"):
        plan(*make_recipe([(adapter, 1.0)], base=_edited(base, QUANTISED[name])))
