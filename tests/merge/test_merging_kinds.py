"""Merges of what is more than plain LoRA of whole layers: packed layers, other algorithms, biases."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from merge import errors
from merge.families import FAMILIES
from tests.fixtures import packed
from tests.fixtures.engine import run
from tests.fixtures.packed import WIDTH, changes, random, write
from tests.merge.test_convert import (
    FUSED,
    FUSED_ROWS,
    LINEAR,
    SAME,
    dora,
    fused_file,
    loha,
    lokr,
    norm_file,
    split_file,
)

# transformers' own deprecation, reached through peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")


@pytest.fixture(autouse=True)
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "packed", packed.packed_family())


def assert_is_sum(
    out: Path, parts: Mapping[Path, float], factors: Mapping[str, float] | None = None
) -> None:
    """Every weight and bias of the output is the weighted sum; `factors` are by end of a module."""
    for kind in (0, 1):
        expected: dict[tuple[str, str], torch.Tensor] = {}
        for path, strength in parts.items():
            for name, change in changes(path)[kind].items():
                ends = [f for end, f in (factors or {}).items() if name[1].endswith(end)]
                scaled = change * strength * (ends[0] if ends else 1.0)
                expected[name] = expected.get(name, torch.zeros_like(change)) + scaled
        found = changes(out)[kind]
        assert found.keys() >= {name for name, change in expected.items() if change.any()}
        for name, change in found.items():
            wanted = expected.get(name, torch.zeros_like(change))
            torch.testing.assert_close(change, wanted, rtol=1e-5, atol=1e-7, msg=str(name))


FLOAT32 = {"output": {"dtype": "float32"}}


def written(tmp_path: Path, dialect: str) -> tuple[Path, Path]:
    """(what to write, the weights in it)."""
    if dialect == "peft":
        return tmp_path / "out", tmp_path / "out" / "adapter_model.safetensors"
    return tmp_path / "out.safetensors", tmp_path / "out.safetensors"


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "diffusers", "peft"])
@pytest.mark.parametrize("rank", [{"exact": True}, {"fixed": 64}], ids=["exact", "fixed"])
def test_packed_and_split_layers_add_up_in_rows(
    dialect: str, rank: dict[str, Any], tmp_path: Path
) -> None:
    one = fused_file(tmp_path / "one.safetensors")
    two = split_file(tmp_path / "two.safetensors", SAME, dict.fromkeys(SAME, 3.0))
    out, weights = written(tmp_path, dialect)
    run(out, [(one, 0.7), (two, -0.5)], rank=rank, output={"dialect": dialect, "dtype": "float32"})
    assert_is_sum(weights, {one: 0.7, two: -0.5})


def test_a_block_pattern_on_a_part_reaches_only_its_rows(tmp_path: Path) -> None:
    path = fused_file(tmp_path / "one.safetensors")
    out = tmp_path / "out.safetensors"
    source = {"ref": str(path), "strength": 2.0, "blocks": {"*.to_q": 0.25, "*.to_k": 0.0}}
    run(out, [source], **FLOAT32)
    assert_is_sum(out, {path: 2.0}, {"to_q": 0.25, "to_k": 0.0})


def test_algorithms_with_an_exact_product_add_up(tmp_path: Path) -> None:
    paths = {
        fused_file(tmp_path / "lora.safetensors"): 0.5,
        write(tmp_path / "loha.safetensors", loha(FUSED, FUSED_ROWS, WIDTH, 3, seed=1)): -1.0,
        write(tmp_path / "lokr.safetensors", lokr(FUSED, (4, 2), (10, 4), 2)): 2.0,
    }
    out = tmp_path / "out.safetensors"
    outcome = run(out, list(paths.items()), **FLOAT32)
    assert_is_sum(out, paths)
    ranks = {name: its["rank"] for name, its in outcome.certificate["modules"].items()}
    assert ranks["transformer.layers.0.linear1"] == 3 + 9 + 4
    assert ranks["transformer.final.adaLN.1"] == 2
    found = {key: tensor for key, tensor in load_file(out).items() if key.endswith(".alpha")}
    assert len(found) == 2
    assert {tensor.item() for tensor in found.values()} == {16.0}


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_changes_of_biases_add_up(dialect: str, tmp_path: Path) -> None:
    one = fused_file(tmp_path / "one.safetensors", alpha=6.0)
    write(one, load_file(one) | {f"{FUSED}.diff_b": random(FUSED_ROWS, seed=9)})
    two = split_file(tmp_path / "two.safetensors", SAME, dict.fromkeys(SAME, 3.0))
    tensors = load_file(two)
    tensors["transformer.blocks.0.attn.to_q.lora_B.bias"] = random(WIDTH, seed=4)
    with safe_open(two, "pt") as file:
        write(two, tensors, **file.metadata())
    out, weights = written(tmp_path, dialect)
    outcome = run(out, [(one, 0.7), (two, 2.0)], output={"dialect": dialect, "dtype": "float32"})
    assert_is_sum(weights, {one: 0.7, two: 2.0})
    assert all(name.endswith(".bias") for name in outcome.certificate["summed"])


def test_differences_that_are_stored_whole_add_up(tmp_path: Path) -> None:
    one = norm_file(tmp_path / "one.safetensors")
    full = {
        f"{FUSED}.diff": random(FUSED_ROWS, WIDTH),
        f"{FUSED}.diff_b": random(FUSED_ROWS, seed=2),
    }
    two = write(tmp_path / "two.safetensors", full)
    out = tmp_path / "out.safetensors"
    outcome = run(out, [(one, 0.5), (two, 2.0), (one, 1.0)], **FLOAT32)
    assert_is_sum(out, {one: 1.5, two: 2.0})
    assert set(outcome.certificate["summed"]) == {
        "transformer.blocks.0.norm.weight",
        "transformer.layers.0.linear1.weight",
        "transformer.layers.0.linear1.bias",
    }


WHOLE = lokr(LINEAR, (2, 4), (4, 4), None)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (dora((FUSED_ROWS, 1)), "what dora does to .*linear1 depends on the base; bake it"),
        (WHOLE, r"the change of .*linear2 \(lokr\) is no low-rank product; bake it"),
    ],
)
def test_what_cannot_be_part_of_an_adapter_is_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(errors.Unsupported, match=rf"bad.safetensors: {message}"):
        run(tmp_path / "out.safetensors", [(path, 1.0)])
    assert not (tmp_path / "out.safetensors").exists()


def test_factors_and_a_whole_difference_of_one_layer_do_not_add_up(tmp_path: Path) -> None:
    one = fused_file(tmp_path / "one.safetensors")
    two = write(tmp_path / "two.safetensors", {f"{FUSED}.diff": random(FUSED_ROWS, WIDTH)})
    with pytest.raises(errors.Unsupported, match="two.safetensors: it changes .* as a whole"):
        run(tmp_path / "out.safetensors", [(one, 1.0), (two, 1.0)])


@pytest.mark.parametrize("dialect", ["diffusers", "peft"])
def test_what_a_dialect_cannot_hold_is_said_before_anything_is_written(
    dialect: str, tmp_path: Path
) -> None:
    path = norm_file(tmp_path / "one.safetensors")
    message = rf"output.dialect: {dialect} cannot hold a difference that is stored whole"
    with pytest.raises(errors.BadRecipe, match=message):
        run(tmp_path / "out", [(path, 1.0)], output={"dialect": dialect})
    bias = write(tmp_path / "two.safetensors", {f"{FUSED}.diff_b": random(FUSED_ROWS)})
    with pytest.raises(errors.BadRecipe, match="cannot hold a change of the bias alone"):
        run(tmp_path / "out", [(bias, 1.0)], output={"dialect": dialect})


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config)


TARGETS = ["q_proj", "v_proj", "down_proj"]


def llm_adapter(folder: Path, seed: int, **options: Any) -> Path:
    wrapped = get_peft_model(llama(), LoraConfig(target_modules=TARGETS, **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    wrapped.save_pretrained(folder)
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize("rank", [{"exact": True}, {"fixed": 7}], ids=["exact", "fixed"])
def test_adapters_of_a_language_model_merge_for_peft(rank: dict[str, Any], tmp_path: Path) -> None:
    one = llm_adapter(tmp_path / "one", 1, r=4, lora_alpha=2)
    two = llm_adapter(tmp_path / "two", 2, r=3, lora_alpha=6, use_rslora=True)
    run(tmp_path / "out", [(one, 0.8), (two, 0.5)], rank=rank)
    model = PeftModel.from_pretrained(llama(), tmp_path / "out").merge_and_unload()
    expected = llama()
    for folder, strength in ((one.parent, 0.8), (two.parent, 0.5)):
        merged = PeftModel.from_pretrained(llama(), folder).merge_and_unload()
        for (_, weight), (_, changed), (_, base) in zip(
            expected.named_parameters(),
            merged.named_parameters(),
            llama().named_parameters(),
            strict=True,
        ):
            weight.data += strength * (changed.data - base.data)
    tokens = torch.arange(12).reshape(1, 12)
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-5)


def test_adapters_of_an_unknown_model_are_written_for_peft_alone(tmp_path: Path) -> None:
    one = llm_adapter(tmp_path / "one", 1, r=4, lora_alpha=2)
    with pytest.raises(errors.BadRecipe, match="a model of no family we know, which only peft"):
        run(tmp_path / "out.safetensors", [(one, 1.0)], output={"dialect": "kohya"})
    run(tmp_path / "out", [(one, 1.0)])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert min(config["target_modules"]) == "model.layers.0.mlp.down_proj"
