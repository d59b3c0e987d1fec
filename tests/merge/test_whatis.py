"""Which adapters are in a checkpoint: baked by us, fused by diffusers and peft, or added by hand."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from merge.errors import BadRecipe, UnknownModules
from merge.families import FAMILIES, Family
from merge.fits import Products, cosine, fit
from merge.recipe import Recipe
from merge.threads import Cancelled
from merge.whatis import Answer, whatis
from tests.fixtures import packed
from tests.fixtures.checkpoints import VAE, save_checkpoint
from tests.fixtures.engine import MadeAdapter, make_adapter, pin_files, run, some_of
from tests.fixtures.factors import layers, write_base, write_factors
from tests.fixtures.families import make_models, tiny_family, tiny_llama

# transformers' own deprecation, reached through peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")
PIPELINE = Path(__file__).parents[2] / "train" / "tiny" / "pipeline"


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (tiny_family("sd15-tiny"), packed.packed_family()):
        monkeypatch.setitem(FAMILIES, found.name, found)


@pytest.fixture
def sd15() -> Family:
    return tiny_family("sd15-tiny")


def ask(checkpoint: Path, base: Path, adapters: Sequence[Path], **options: Any) -> Answer:
    inputs = [{"ref": str(path)} for path in adapters]
    recipe, files = pin_files(
        Recipe.parse({"kind": "bake", "base": {"ref": str(base)}, "inputs": inputs})
    )
    return whatis(
        checkpoint, recipe, files, lambda done, total: None, lambda: False, workers=2, **options
    )


def save_base(folder: Path, family: Family, dtype: torch.dtype) -> Path:
    models = make_models(family.name)
    return save_checkpoint(folder / "base.safetensors", family, models, "ldm", dtype, VAE)


@pytest.fixture
def ink(sd15: Family, tmp_path: Path) -> MadeAdapter:
    return make_adapter(tmp_path / "ink.safetensors", sd15, some_of(sd15), size=0.3)


@pytest.fixture
def robot(sd15: Family, tmp_path: Path) -> MadeAdapter:
    return make_adapter(
        tmp_path / "robot.safetensors", sd15, some_of(sd15), rank=6, seed=2, size=0.3
    )


def test_strengths_are_those_of_the_normal_equations() -> None:
    random = np.random.default_rng(0)
    adapters = random.standard_normal((3, 500))
    noise = random.standard_normal(500) * 0.1
    change = 0.7 * adapters[0] - 0.2 * adapters[2] + noise
    rows = np.vstack([change, adapters])
    found = fit(Products(rows @ rows.T, 500))
    wanted, residual, *_ = np.linalg.lstsq(adapters.T, change, rcond=None)
    np.testing.assert_allclose(np.array(found.strengths, dtype=float), wanted, rtol=1e-9)
    assert found.left == pytest.approx(residual[0] / (change**2).sum(), rel=1e-9)
    covariance = np.linalg.inv(adapters @ adapters.T) * residual[0] / (500 - 3)
    np.testing.assert_allclose(found.errors, np.sqrt(np.diag(covariance)), rtol=1e-9)
    for i in range(3):
        others = np.delete(adapters, i, 0)
        without = np.linalg.lstsq(others.T, change, rcond=None)[1][0]
        assert found.alone[i] == pytest.approx(
            (without - residual[0]) / (change**2).sum(), rel=1e-8
        )
    assert cosine(found.products, 0, 1) == pytest.approx(np.corrcoef(adapters[:2])[0, 1], abs=0.05)


def test_an_adapter_that_changes_nothing_has_no_strength() -> None:
    rows = np.array([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    found = fit(Products(rows @ rows.T, 3))
    assert found.strengths[1] is None
    assert found.strengths[0] == pytest.approx(0.5)
    assert found.left == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_strengths_of_a_bake_are_found_and_nothing_is_left(
    sd15: Family, ink: MadeAdapter, robot: MadeAdapter, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_base(tmp_path, sd15, dtype)
    other = make_adapter(tmp_path / "other.safetensors", sd15, some_of(sd15), seed=3)
    run(tmp_path / "baked.safetensors", [(ink.path, 0.8), (robot.path, -0.3)], base=base)
    answer = ask(tmp_path / "baked.safetensors", base, [ink.path, robot.path, other.path])
    strengths = answer.whole.strengths
    assert strengths[0] == pytest.approx(0.8, abs=5e-3)
    assert strengths[1] == pytest.approx(-0.3, abs=5e-3)
    assert [answer.is_in(i) for i in range(3)] == [True, True, False]
    assert answer.level == "everywhere"
    assert answer.is_rounding
    assert answer.left < {torch.float16: 1e-5, torch.bfloat16: 1e-3, torch.float32: 1e-11}[dtype]
    assert not answer.other
    assert not answer.alike


def test_a_small_change_of_bfloat16_weights_is_still_all_of_the_difference(
    sd15: Family, tmp_path: Path
) -> None:
    """Most weights do not move at all, and what is left is half of the change and more."""
    weak = make_adapter(tmp_path / "weak.safetensors", sd15, some_of(sd15), size=0.012)
    base = save_base(tmp_path, sd15, torch.bfloat16)
    run(tmp_path / "baked.safetensors", [(weak.path, 1.0)], base=base)
    answer = ask(tmp_path / "baked.safetensors", base, [weak.path])
    assert answer.left > 0.2
    assert answer.is_rounding
    assert answer.is_in(0)


def test_the_base_is_itself(sd15: Family, ink: MadeAdapter, tmp_path: Path) -> None:
    base = save_base(tmp_path, sd15, torch.float16)
    answer = ask(base, base, [ink.path])
    assert answer.is_same
    assert not answer.is_in(0)
    models = make_models("sd15-tiny")
    state = save_checkpoint(tmp_path / "folder", sd15, models, "folder", torch.float32, VAE)
    assert ask(base, state, [ink.path]).is_same


def test_something_else_is_said_to_be_there(
    sd15: Family, ink: MadeAdapter, robot: MadeAdapter, tmp_path: Path
) -> None:
    base = save_base(tmp_path, sd15, torch.float32)
    run(tmp_path / "baked.safetensors", [(ink.path, 0.8), (robot.path, 1.5)], base=base)
    answer = ask(tmp_path / "baked.safetensors", base, [ink.path])
    size = sum(float(((0.8 * d + 1.5 * robot.deltas[n]) ** 2).sum()) for n, d in ink.deltas.items())
    inner = sum(float((d * (0.8 * d + 1.5 * robot.deltas[n])).sum()) for n, d in ink.deltas.items())
    own = sum(float((d**2).sum()) for d in ink.deltas.values())
    assert answer.whole.strengths[0] == pytest.approx(inner / own, rel=1e-4)
    assert answer.whole.left == pytest.approx(1 - inner**2 / own / size, rel=1e-4)
    assert abs(inner / own - 0.8) < 6 * answer.whole.errors[0]
    assert not answer.is_rounding
    assert not ask(tmp_path / "baked.safetensors", base, [_stranger(sd15, tmp_path)]).is_in(0)


def _stranger(family: Family, folder: Path) -> Path:
    made = make_adapter(folder / "stranger.safetensors", family, some_of(family), seed=9, size=0.3)
    return made.path


@pytest.mark.parametrize(
    ("chosen", "level"),
    [
        ({"components": {"text_encoder": 0.2}}, "component"),
        ({"blocks": {"unet.down_blocks.0.*": 0.5}}, "block"),
        ({"blocks": {"*.to_q": 0.5}}, "layer"),
    ],
)
def test_strengths_that_differ_are_found_where_they_differ(
    sd15: Family, chosen: dict[str, Any], level: str, tmp_path: Path
) -> None:
    names = [
        *some_of(sd15),
        *(("unet", f"up_blocks.3.attentions.0.{end}") for end in ("proj_in", "proj_out")),
    ]
    made = make_adapter(tmp_path / "a.safetensors", sd15, names, size=0.3)
    base = save_base(tmp_path, sd15, torch.float16)
    wanted = {"ref": str(made.path), "strength": 0.8, **chosen}
    run(tmp_path / "baked.safetensors", [wanted], base=base)
    answer = ask(tmp_path / "baked.safetensors", base, [made.path])
    assert answer.level == level
    assert answer.is_rounding
    strengths = {
        name: strength
        for name, its in answer.fits.items()
        if (strength := its.strengths[0]) is not None
    }
    expected = {
        "component": {"unet": 0.8, "text_encoder": 0.2},
        "block": {"unet.down_blocks.0": 0.4, "unet.up_blocks.3": 0.8},
        "layer": {
            f"unet.{module}": 0.4 if module.endswith("to_q") else 0.8
            for component, module in names
            if component == "unet"
        },
    }[level]
    for name, strength in expected.items():
        assert strengths[name] == pytest.approx(strength, abs=1e-3), name


def test_adapters_that_are_nearly_the_same_are_not_told_apart(
    sd15: Family, ink: MadeAdapter, robot: MadeAdapter, tmp_path: Path
) -> None:
    tensors = load_file(ink.path)
    generator = torch.Generator().manual_seed(0)
    for key, tensor in tensors.items():
        if "lora_up" in key:
            tensors[key] = tensor + torch.randn(tensor.shape, generator=generator).half() * 5e-3
    save_file(tensors, tmp_path / "twin.safetensors")
    base = save_base(tmp_path, sd15, torch.float16)
    run(tmp_path / "baked.safetensors", [(ink.path, 0.8), (robot.path, 0.5)], base=base)
    adapters = [robot.path, ink.path, tmp_path / "twin.safetensors"]
    answer = ask(tmp_path / "baked.safetensors", base, adapters)
    assert answer.alike == ((1, 2),)
    assert answer.whole.strengths[2] is None
    assert answer.whole.strengths[1] == pytest.approx(0.8, abs=1e-2)
    assert answer.whole.strengths[0] == pytest.approx(0.5, abs=1e-3)
    assert answer.is_in(1)
    assert answer.is_in(2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_diffusers_has_fused(dtype: torch.dtype, tmp_path: Path) -> None:
    family = FAMILIES["tiny-sd"]
    names = [name for name in some_of(family) if name[0] == "unet"]
    made = make_adapter(tmp_path / "ink.safetensors", family, names, rank=4, alpha=4, size=0.3)
    pipe: Any = StableDiffusionPipeline.from_pretrained(PIPELINE, dtype=dtype)
    pipe.save_pretrained(tmp_path / "base")
    pipe.load_lora_weights(tmp_path, weight_name="ink.safetensors")
    pipe.fuse_lora(lora_scale=0.6)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    answer = ask(tmp_path / "fused", tmp_path / "base", [made.path])
    assert answer.whole.strengths[0] == pytest.approx(0.6, abs=2e-3)
    assert answer.is_in(0)
    assert answer.is_rounding
    assert answer.level == "everywhere"


def test_what_peft_has_merged_into_a_language_model(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted: Any = get_peft_model(tiny_llama(), config)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged", max_shard_size="100KB")
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    answer = ask(tmp_path / "merged", tmp_path / "base", [adapter])
    assert answer.whole.strengths[0] == pytest.approx(1.0, abs=1e-5)
    assert answer.is_rounding
    assert answer.differing == 4


def test_changes_that_depend_on_the_base_are_computed_on_it(
    sd15: Family, ink: MadeAdapter, tmp_path: Path
) -> None:
    tensors = load_file(ink.path)
    for key in list(tensors):
        if key.endswith("to_q.lora_up.weight"):
            rows = tensors[key].shape[0]
            tensors[key.replace("lora_up.weight", "dora_scale")] = torch.linspace(0.5, 2, rows)[
                :, None
            ]
    save_file(tensors, tmp_path / "dora.safetensors")
    base = save_base(tmp_path, sd15, torch.float32)
    run(tmp_path / "baked.safetensors", [(tmp_path / "dora.safetensors", 0.7)], base=base)
    answer = ask(tmp_path / "baked.safetensors", base, [tmp_path / "dora.safetensors"])
    assert answer.whole.strengths[0] == pytest.approx(0.7, abs=1e-5)
    assert answer.is_rounding


# PEFT's replacements of rows are no multiple of a change, and their strengths are all or nothing.
ALGORITHMS = [
    *("lora", "loha", "lokr", "vera", "full", "norm", "lora-embedding"),
    *("glora", "glora-paper", "oft", "oft-legacy", "boft", "boft-legacy"),
    *("ia3", "ia3-peft", "oft-peft", "boft-peft", "hra", "hira"),
]


@pytest.mark.parametrize("layout", ALGORITHMS)
def test_every_algorithm_is_found_at_its_strength(layout: str, tmp_path: Path) -> None:
    held = layers(layout)
    base = write_base(tmp_path / "base.safetensors", held)
    adapter = write_factors(tmp_path / "adapter.safetensors", layout, held)
    run(tmp_path / "baked.safetensors", [(adapter, 0.6)], base=base, numerics="reproducible")
    answer = ask(tmp_path / "baked.safetensors", base, [adapter])
    assert answer.whole.strengths[0] == pytest.approx(0.6, abs=1e-5)
    assert answer.is_rounding
    assert not answer.ignored


def test_packed_layers_and_biases_take_part(tmp_path: Path) -> None:
    state = {}
    for path, module in packed.packed_family().components["transformer"].items():
        state[f"{path}.weight"] = packed.random(*module.shape, seed=1, dtype=torch.float32)
        if module.has_bias:
            state[f"{path}.bias"] = torch.zeros(module.shape[0])
    save_file(state, tmp_path / "base.safetensors")
    stem = "lora_unet_layers_0_linear1"
    tensors = packed.lora(stem, 3 * packed.WIDTH + packed.HIDDEN, packed.WIDTH, 2, 5)
    tensors[f"{stem}.diff_b"] = packed.random(3 * packed.WIDTH + packed.HIDDEN, seed=7)
    packed.write(tmp_path / "fused.safetensors", tensors)
    run(
        tmp_path / "baked.safetensors",
        [(tmp_path / "fused.safetensors", 0.5)],
        base=tmp_path / "base.safetensors",
    )
    answer = ask(
        tmp_path / "baked.safetensors",
        tmp_path / "base.safetensors",
        [tmp_path / "fused.safetensors"],
    )
    assert answer.whole.strengths[0] == pytest.approx(0.5, abs=1e-5)
    assert answer.is_rounding
    assert answer.differing == 4


def test_what_is_not_compared_is_named(sd15: Family, ink: MadeAdapter, tmp_path: Path) -> None:
    base = save_base(tmp_path, sd15, torch.float16)
    run(tmp_path / "baked.safetensors", [(ink.path, 1.0)], base=base)
    state = load_file(tmp_path / "baked.safetensors")
    kept = {k: t for k, t in state.items() if not k.startswith("cond_stage_model")}
    kept["first_stage_model.decoder.conv_in.weight"] += 1
    save_file(kept, tmp_path / "part.safetensors")
    answer = ask(tmp_path / "part.safetensors", base, [ink.path])
    assert answer.unmatched == ("text_encoder.*",)
    assert answer.other == ("vae.decoder.conv_in.weight",)
    assert answer.ignored == {"ink.safetensors": 3}
    assert answer.whole.strengths[0] == pytest.approx(1.0, abs=1e-3)
    text = make_adapter(
        tmp_path / "text.safetensors", sd15, [n for n in some_of(sd15) if n[0] != "unet"]
    )
    with pytest.raises(UnknownModules, match=r"text.safetensors: 3 modules are not in both"):
        ask(tmp_path / "part.safetensors", base, [text.path])


def test_adapters_of_another_model_are_refused(sd15: Family, tmp_path: Path) -> None:
    base = save_base(tmp_path, sd15, torch.float16)
    family = FAMILIES["tiny-sd"]
    other = make_adapter(tmp_path / "other.safetensors", family, some_of(family))
    with pytest.raises(BadRecipe, match=r"other.safetensors is for another model"):
        ask(base, base, [other.path])


def test_it_can_be_cancelled_and_counts_to_the_end(
    sd15: Family, ink: MadeAdapter, tmp_path: Path
) -> None:
    base = save_base(tmp_path, sd15, torch.float16)
    seen: list[tuple[int, int]] = []
    recipe, files = pin_files(
        Recipe.parse(
            {"kind": "bake", "base": {"ref": str(base)}, "inputs": [{"ref": str(ink.path)}]}
        )
    )
    go_on: Callable[[], bool] = lambda: False
    whatis(base, recipe, files, lambda done, total: seen.append((done, total)), go_on)
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    with pytest.raises(Cancelled):
        whatis(base, recipe, files, lambda done, total: None, lambda: True)
