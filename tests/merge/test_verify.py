"""A file is made again from its recipe and compared: what is proved, and what every change shows."""

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge import compare, rebuild
from merge.compare import Verdict
from merge.errors import BadRecipe, MissingSources
from merge.leaves import search
from merge.lineage import read
from merge.pins import pin
from merge.recipe import Source
from merge.verify import Proof, verify
from tests.fixtures.engine import family_of, make_adapter, run, some_of

FAMILY = family_of("tiny-sd")
NAMES = some_of(FAMILY)
UNET = [name for name in NAMES if name[0] == "unet"]
PIPELINE = Path(__file__).parents[2] / "train" / "tiny" / "pipeline"
UP = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"


@pytest.fixture
def leaves(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "leaves"
    folder.mkdir()
    return [
        make_adapter(folder / f"{seed}.safetensors", FAMILY, UNET, rank=3, seed=seed).path
        for seed in range(3)
    ]


def proof(path: Path, files: list[Path]) -> Proof:
    """The proof of a file from those files alone."""
    held = {pin(file).sha256: file for file in files}

    def find(source: Source) -> Path | None:
        return held.get(source.sha256 or "")

    history = read(path)
    leaves = search(history.recipe, history.parents, find, path.name)
    scratch = tempfile.mkdtemp(dir=files[0].parent)
    return verify(path, history, leaves, Path(scratch), lambda plan, done, total: None)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rank": {"fixed": 2}, "output": {"dialect": "diffusers", "dtype": "bfloat16"}},
        {"rank": {"energy": 0.5}, "output": {"dialect": "peft", "dtype": "float32"}},
        {"numerics": "reproducible", "rank": {"shared": 2}},
        {"base": PIPELINE},
        {"base": PIPELINE, "numerics": "reproducible"},
    ],
)
def test_what_nobody_touched_is_the_same_bytes(
    tmp_path: Path, leaves: list[Path], fields: dict[str, Any]
) -> None:
    is_folder = "base" in fields or fields.get("output", {}).get("dialect") == "peft"
    out = tmp_path / ("out" if is_folder else "out.safetensors")
    run(out, [(leaves[0], 0.7), (leaves[1], -0.5)], **fields)
    found = proof(out, [*leaves, PIPELINE])
    assert found.verdict is Verdict.BYTES
    assert found.notes == []
    assert found.comparison.same == found.comparison.tensors > 10


def test_extractions_and_resizes_are_proved_too(tmp_path: Path, leaves: list[Path]) -> None:
    tuned, small = tmp_path / "tuned", tmp_path / "small.safetensors"
    run(tuned, [(leaves[0], 0.7)], base=PIPELINE)
    taken = tmp_path / "taken.safetensors"
    wanted = {"kind": "extract", "tuned": {"ref": str(tuned)}, "rank": {"fixed": 2}}
    run(taken, [], base=PIPELINE, output={"dialect": "kohya"}, **wanted)
    assert proof(taken, [*leaves, tuned, PIPELINE]).verdict is Verdict.BYTES
    run(small, [(taken, 1.0)], kind="resize", rank={"fixed": 1})
    taken.unlink()
    # What was tuned is itself made again, from its base and a leaf.
    found = proof(small, [*leaves, PIPELINE])
    assert found.verdict is Verdict.BYTES
    assert next(its.sha256 for its in found.remade) == pin(tuned).sha256


def rewritten(
    path: Path,
    change: Callable[[dict[str, torch.Tensor], dict[str, str]], None],
) -> Path:
    """A copy of a file in which something is changed."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path.with_name("changed.safetensors"), metadata)
    return path.with_name("changed.safetensors")


def flip(path: Path, key: str, bit: int) -> None:
    """Flip one bit of the first value of a tensor, in place."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        at = 8 + length + header[key]["data_offsets"][0] + bit // 8
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.parametrize(
    ("numerics", "bit", "verdict"),
    [
        ("fast", 0, Verdict.ROUNDING),  # the last of a float16's significand
        ("fast", 9, Verdict.DIFFERS),
        ("fast", 15, Verdict.DIFFERS),
        ("reproducible", 0, Verdict.DIFFERS),
    ],
)
def test_one_flipped_bit_is_found_and_its_tensor_named(
    tmp_path: Path, leaves: list[Path], numerics: str, bit: int, verdict: Verdict
) -> None:
    out = tmp_path / "out.safetensors"
    run(out, [(leaves[0], 0.7), (leaves[1], -0.5)], numerics=numerics)
    flip(out, UP, bit)
    found = proof(out, leaves)
    assert found.verdict is verdict
    (difference,) = found.comparison.differences
    assert (difference.tensor, difference.differing) == (UP, 1)
    assert difference.values == load_file(out)[UP].numel()
    assert difference.largest is not None


def test_a_flipped_bit_of_a_bake_is_found_in_its_file(tmp_path: Path, leaves: list[Path]) -> None:
    out = tmp_path / "out"
    run(out, [(leaves[0], 0.7)], base=PIPELINE)
    flip(out / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_in.weight", 13)
    found = proof(out, [*leaves, PIPELINE])
    assert found.verdict is Verdict.DIFFERS
    (difference,) = found.comparison.differences
    assert difference.file == "vae/diffusion_pytorch_model.safetensors"
    assert difference.tensor == "decoder.conv_in.weight"


def test_a_difference_beyond_the_first_piece_is_found(
    tmp_path: Path, leaves: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.safetensors"
    run(out, [(leaves[0], 0.7)])

    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors[UP].view(-1)[-1] += 1

    monkeypatch.setattr(compare, "PIECE_BYTES", 64)
    changed = rewritten(out, change)
    assert load_file(out)[UP].nbytes > 3 * 64
    (difference,) = proof(changed, leaves).comparison.differences
    assert (difference.tensor, difference.differing) == (UP, 1)


def turned(tensors: dict[str, torch.Tensor], by: float) -> None:
    """Other factors of a product that is `by` times the same."""
    down = UP.replace("up", "down")
    rank = tensors[down].shape[0]
    turn, _ = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(0)))
    tensors[UP] = (tensors[UP].float() @ turn * by).half()
    tensors[down] = (turn.mT @ tensors[down].float()).half()


@pytest.mark.parametrize(
    ("by", "numerics", "verdict"),
    [
        (1.0, "fast", Verdict.ROUNDING),
        (1.01, "fast", Verdict.DIFFERS),
        (1.0, "reproducible", Verdict.DIFFERS),
    ],
)
def test_other_factors_of_the_same_product_are_rounding_and_of_another_are_not(
    tmp_path: Path, leaves: list[Path], by: float, numerics: str, verdict: Verdict
) -> None:
    out = tmp_path / "out.safetensors"
    run(out, [(leaves[0], 0.7), (leaves[1], -0.5)], rank={"fixed": 3}, numerics=numerics)
    found = proof(rewritten(out, lambda tensors, _: turned(tensors, by)), leaves)
    assert found.verdict is verdict
    assert {its.tensor for its in found.comparison.differences} == {UP, UP.replace("up", "down")}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors, _: tensors.pop(UP), "is missing"),
        (lambda tensors, _: tensors.update(x=torch.zeros(1)), "the recipe makes no such tensor"),
        (lambda t, _: t.update({UP: t[UP].float()}), "is F32[48, 6] where the recipe makes F16"),
        (lambda t, _: t.update({UP: t[UP][:, :2].clone()}), "is F16[48, 2] where the recipe"),
        (lambda tensors, _: tensors[UP].view(-1)[:1].fill_(float("nan")), "1 of 288 values"),
    ],
)
def test_tensors_that_are_not_what_the_recipe_makes_are_named(
    tmp_path: Path, leaves: list[Path], change: Any, says: str
) -> None:
    out = tmp_path / "out.safetensors"
    run(out, [(leaves[0], 0.7), (leaves[1], -0.5)])
    found = proof(rewritten(out, change), leaves)
    assert found.verdict is Verdict.DIFFERS
    (difference,) = found.comparison.differences
    assert difference.what.startswith(says)


def remade_with(metadata: dict[str, str], **fields: Any) -> None:
    """Change fields of a recipe and its digest with it."""
    recipe = json.loads(metadata["graft.recipe"]) | fields
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    metadata["graft.recipe"] = text
    metadata["graft.recipe_digest"] = "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def with_figure(metadata: dict[str, str], field: str, value: Any) -> None:
    certificate = json.loads(metadata["graft.certificate"]) | {field: value}
    metadata["graft.certificate"] = json.dumps(certificate)


@pytest.mark.parametrize(
    ("change", "verdict", "says"),
    [
        (lambda m: m.update({"modelspec.title": "Ink"}), Verdict.TENSORS, "title was added"),
        (lambda m: m.pop("graft.certificate"), Verdict.TENSORS, "certificate is not in it"),
        (lambda m: m.update({"graft.version": "1"}), Verdict.TENSORS, "version 1 of the engine"),
        (lambda m: with_figure(m, "error", 0.5), Verdict.DIFFERS, "error 0.5 where it is"),
        (lambda m: with_figure(m, "left_out", ["x"]), Verdict.DIFFERS, 'left_out ["x"] where'),
        (lambda m: remade_with(m, rank={"fixed": 4}), Verdict.DIFFERS, ""),
        (
            lambda m: m.update({"lora_adapter_metadata": "{}"}),
            Verdict.DIFFERS,
            "lora_adapter_metadata says otherwise",
        ),
    ],
)
def test_what_changed_in_the_metadata_is_said(
    tmp_path: Path, leaves: list[Path], change: Any, verdict: Verdict, says: str
) -> None:
    out = tmp_path / "out.safetensors"
    wanted = [(leaves[0], 0.7), (leaves[1], -0.5)]
    run(out, wanted, rank={"fixed": 3}, output={"dialect": "diffusers"})
    found = proof(rewritten(out, lambda _, metadata: change(metadata)), leaves)
    assert found.verdict is verdict
    assert any(says in text for text in [*found.notes, *found.comparison.wrong, ""])


def test_the_configuration_of_a_peft_adapter_counts(tmp_path: Path, leaves: list[Path]) -> None:
    out = tmp_path / "out"
    run(out, [(leaves[0], 0.7)], output={"dialect": "peft"})
    path = out / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config))
    assert proof(out, leaves).verdict is Verdict.TENSORS
    path.write_text(json.dumps(config | {"lora_alpha": 99}))
    found = proof(out / "adapter_model.safetensors", leaves)
    assert found.verdict is Verdict.DIFFERS
    assert found.comparison.wrong == ("adapter_config.json says otherwise: lora_alpha",)
    path.unlink()
    assert "adapter_config.json is missing" in proof(out, leaves).comparison.wrong


def test_a_merge_of_merges_is_made_again_from_its_leaves(
    tmp_path: Path, leaves: list[Path]
) -> None:
    a, b, c = leaves
    first, second = tmp_path / "first.safetensors", tmp_path / "second"
    run(first, [(a, 0.7), (b, 0.5)])
    run(second, [(first, 1.0), (c, -0.5)], output={"dialect": "peft"})
    weights = second / "adapter_model.safetensors"
    third, baked = tmp_path / "third.safetensors", tmp_path / "baked"
    run(third, [(weights, 1.0), (a, 0.1)])
    run(baked, [(third, 1.0)], base=PIPELINE)
    made = [pin(path).sha256 for path in (first, weights, third)]
    for path in (first, weights, third):
        path.unlink()
    found = proof(baked, [*leaves, PIPELINE])
    assert found.verdict is Verdict.BYTES
    assert [its.sha256 for its in found.remade] == made
    assert found.notes == []


def forged_parent(metadata: dict[str, str]) -> None:
    parents = json.loads(metadata["graft.parents"])
    for recipe in parents.values():
        recipe["inputs"][0]["strength"] = 3.0
    metadata["graft.parents"] = json.dumps(parents)


def test_a_parent_whose_recipe_is_not_its_own_is_found_out(
    tmp_path: Path, leaves: list[Path]
) -> None:
    a, b, c = leaves
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    run(first, [(a, 0.7), (b, 0.5)])
    run(second, [(first, 1.0), (c, -0.5)])
    found = proof(rewritten(second, lambda _, metadata: forged_parent(metadata)), leaves)
    assert found.verdict is Verdict.DIFFERS
    assert any(f"sha256:{pin(first).sha256} was made again as" in note for note in found.notes)
    with pytest.raises(BadRecipe, match="another engine or machine"):
        rebuild.require_same(found.remade)


def test_all_that_is_missing_is_listed(tmp_path: Path, leaves: list[Path]) -> None:
    a, b, c = leaves
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    run(first, [(a, 0.7), (b, 0.5)])
    run(second, [(first, 1.0), (c, -0.5)])
    with pytest.raises(MissingSources, match="2 files that it needs were not found") as caught:
        proof(second, [a])
    assert set(caught.value.digests) == {pin(b).sha256, pin(c).sha256}


def test_a_file_that_says_it_was_made_of_itself_is_missing(
    tmp_path: Path, leaves: list[Path]
) -> None:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        recipe = json.loads(metadata["graft.recipe"])
        metadata["graft.parents"] = json.dumps({its["sha256"]: recipe for its in recipe["inputs"]})

    out = tmp_path / "out.safetensors"
    run(out, [(leaves[0], 0.7)])
    with pytest.raises(MissingSources) as caught:
        proof(rewritten(out, change), leaves[1:])
    assert caught.value.digests == (pin(leaves[0]).sha256,)
