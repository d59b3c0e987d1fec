"""Adapters in every dialect: every key is claimed once, scales are right, or the file is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge import errors
from merge.families import FAMILIES
from merge.formats.adapters import AdapterLayout, Entry, config_beside, read_config, read_layout
from merge.formats.dialects import WRITABLE_DIALECTS, diffusers_config, peft_config, write_keys
from merge.formats.reader import TensorFile
from merge.formats.sources import shown_name
from tests.fixtures.adapters import DIALECTS, MadeAdapter, make_adapter
from tests.fixtures.families import tiny_family

UNET = Path(__file__).parents[3] / "train/tiny/pipeline/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _tiny_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sd15-tiny", "sdxl-tiny"):
        monkeypatch.setitem(FAMILIES, name, tiny_family(name))


def scale_of(entry: Entry, file: TensorFile, layout: AdapterLayout) -> float:
    """c as merge.algorithms has it: the configuration's, else alpha / rank, else 1."""
    if "scale" in entry.facts:
        return float(entry.facts["scale"])
    return (
        file.read_scalar(entry.keys["alpha"]) / (entry.rank or 1) if "alpha" in entry.keys else 1.0
    )


def _check(made: MadeAdapter, family: str, dialect: str) -> None:
    """Our reading gives the true delta of every module, and nothing else."""
    with TensorFile(made.path) as file:
        layout = read_layout(file, name=made.path.name, config=made.config)
        assert (layout.family, layout.dialect) == (family, dialect)
        claimed = [key for entry in layout.entries for key in entry.keys.values()]
        assert sorted(claimed) == sorted(made.tensors)
        assert {(e.component, e.layer.module) for e in layout.entries} == set(made.deltas)
        for entry in layout.entries:
            true = made.deltas[entry.component, entry.layer.module or ""]
            assert true.shape == entry.layer.shape
            up, down = (
                file.read_tensor(entry.keys[r]).double().flatten(1).numpy() for r in ("up", "down")
            )
            assert up.shape[1] == entry.rank
            found = scale_of(entry, file, layout) * (up @ down)
            np.testing.assert_allclose(found.reshape(true.shape), true, rtol=1e-12, atol=0)


NAMED = {"processors": "diffusers_old", "kohya_diffusers_names": "kohya"}


@pytest.mark.parametrize("dialect", [*DIALECTS, "kohya_diffusers_names"])
@pytest.mark.parametrize("family", ["tiny-sd", "sd15-tiny", "sdxl-tiny"])
def test_every_dialect_is_read(family: str, dialect: str, tmp_path: Path) -> None:
    linear_only = dialect in ("diffusers_old", "processors")
    made = make_adapter(
        tmp_path / "adapter_model.safetensors",
        family=family,
        dialect=dialect,
        modules="attention" if linear_only else "all",
        ranks=[1, 4, 3],
        alphas=None if linear_only else [8.0, 1.0, 0.5, -2.0, 4.0],
    )
    _check(made, family, NAMED.get(dialect, dialect))


@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize("dialect", ["kohya", "comfy", "diffusers", "diffusers_old", "processors"])
@pytest.mark.parametrize("family", ["sd15-tiny", "sdxl-tiny"])
def test_text_encoders_are_read_with_and_without_text_model(
    family: str, dialect: str, strip: bool, tmp_path: Path
) -> None:
    made = make_adapter(
        tmp_path / "f.safetensors",
        family=family,
        dialect=dialect,
        components=[*FAMILIES[family].components],
        ranks=2,
        strip_text_model=strip,
    )
    _check(made, family, NAMED.get(dialect, dialect))


def test_the_two_encoders_of_a_peft_file_are_told_apart_by_width(tmp_path: Path) -> None:
    for component in ("text_encoder", "text_encoder_2"):
        made = make_adapter(
            tmp_path / component / "adapter_model.safetensors",
            family="sdxl-tiny",
            dialect="peft",
            components=[component],
            alphas=8.0,
        )
        with TensorFile(made.path) as file:
            layout = read_layout(file, name="f", config=made.config)
            assert {e.component for e in layout.entries} == {component}


def test_missing_alphas_mean_one_even_beside_others(tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "f.safetensors", alphas=[8.0, None], ranks=4)
    assert set(made.scales.values()) == {1.0, 2.0}
    _check(made, "tiny-sd", "kohya")
    with TensorFile(made.path) as file:
        assert read_layout(file, name="f").alpha_source == "keys"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_alphas_of_any_dtype_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "f.safetensors", alphas=0.1, dtype=dtype, alpha_dtype=dtype)
    _check(made, "tiny-sd", "kohya")


def test_an_alpha_may_be_a_list_of_one(tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "f.safetensors", alphas=2.0)
    tensors = {k: v.reshape(1) if "alpha" in k else v for k, v in made.tensors.items()}
    save_file(tensors, made.path)
    _check(made, "tiny-sd", "kohya")


def test_alphas_in_older_spellings_belong_to_their_modules(tmp_path: Path) -> None:
    """Stored as float32 they come first in the file, and are spelled as in any other dialect."""
    for dialect, infix in (("diffusers_old", ".lora.down.weight"), ("processors", ".down.weight")):
        made = make_adapter(tmp_path / "f.safetensors", dialect=dialect, ranks=4)
        alphas = {
            key.removesuffix(infix) + ".alpha": torch.tensor(8.0)
            for key in made.tensors
            if key.endswith(infix)
        }
        save_file(made.tensors | alphas, made.path)
        with TensorFile(made.path) as file:
            layout = read_layout(file, name="f")
            assert layout.dialect == "diffusers_old"
            assert {scale_of(e, file, layout) for e in layout.entries} == {2.0}


@pytest.mark.parametrize(
    ("dialect", "source"), [("peft", "config"), ("diffusers", "metadata"), ("kohya", "keys")]
)
def test_the_source_of_scales_is_named(dialect: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    made = make_adapter(path, dialect=dialect, alphas=[8.0, 3.0], ranks=[2, 4, 8])
    with TensorFile(path) as file:
        assert read_layout(file, name="f", config=made.config).alpha_source == source
    _check(made, "tiny-sd", dialect)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_without_any_alpha_the_source_is_assumed(dialect: str, tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "f.safetensors", dialect=dialect)
    with TensorFile(made.path) as file:
        layout = read_layout(file, name="f")
        assert layout.alpha_source == "assumed"
        assert {scale_of(e, file, layout) for e in layout.entries} == {1.0}


def test_a_peft_file_without_alphas_and_configuration_is_refused(tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "f.safetensors", dialect="peft", alphas=8.0)
    missing = "f: its adapter_config.json, which holds its alphas, is missing"
    with TensorFile(made.path) as file, pytest.raises(errors.Unsupported, match=missing):
        read_layout(file, name="f")
    # Metadata that speaks of another component leaves this one's alphas open.
    save_file(made.tensors, made.path, {"lora_adapter_metadata": '{"text_encoder.r": 4}'})
    with TensorFile(made.path) as file, pytest.raises(errors.Unsupported, match=missing):
        read_layout(file, name="f")
    save_file(made.tensors, made.path, {"lora_adapter_metadata": '{"unet.lora_alpha": 8}'})
    with TensorFile(made.path) as file:
        layout = read_layout(file, name="f")
        assert {scale_of(e, file, layout) for e in layout.entries} == {2.0}


def test_a_configuration_belongs_to_peft_keys_under_any_name(tmp_path: Path) -> None:
    peft = make_adapter(tmp_path / "ink.safetensors", dialect="peft", alphas=8.0)
    kohya = make_adapter(tmp_path / "adapter_model.safetensors", dialect="kohya")
    config = tmp_path / "adapter_config.json"
    assert (config_beside(peft.path), config_beside(kohya.path)) == (config, None)
    with TensorFile(peft.path) as file:
        layout = read_layout(file, name="f", config=read_config(peft.path))
        assert {scale_of(e, file, layout) for e in layout.entries} == {2.0}
    config.unlink()
    assert config_beside(peft.path) is None


@pytest.mark.parametrize("dialect", ["peft", "diffusers"])
def test_rslora_divides_by_the_root_of_the_rank(dialect: str, tmp_path: Path) -> None:
    made = make_adapter(
        tmp_path / "adapter_model.safetensors",
        dialect=dialect,
        ranks=[16, 4],
        alphas=8.0,
        use_rslora=True,
    )
    assert set(made.scales.values()) == {2.0, 4.0}
    _check(made, "tiny-sd", dialect)


def test_peft_s_default_alpha_is_eight(tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "f.safetensors", dialect="peft", ranks=4)
    with TensorFile(made.path) as file:
        layout = read_layout(file, name="f", config={"peft_type": "LORA"})
        assert {scale_of(e, file, layout) for e in layout.entries} == {2.0}


def test_one_adapter_name_in_the_keys_is_taken_off(tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "f.safetensors", dialect="peft", alphas=4.0)
    named = {k.replace(".weight", ".default_0.weight"): v for k, v in made.tensors.items()}
    save_file(named, made.path)
    with TensorFile(made.path) as file:
        assert len(read_layout(file, name="f", config=made.config).entries) == len(made.deltas)
        both = named | {k.replace("default_0", "other"): v + 1 for k, v in named.items()}
    save_file(both, made.path)
    with (
        TensorFile(made.path) as file,
        pytest.raises(errors.Unsupported, match="several adapters .default_0, other."),
    ):
        read_layout(file, name="f")


@pytest.mark.parametrize(
    "respell",
    [
        lambda key: key.replace(".lora_", "_.lora_").replace(".alpha", "_.alpha"),
        lambda key: key.replace("lora_unet_", "lora_unet__"),
    ],
)
def test_stray_underscores_of_kohya_names_are_forgiven(
    respell: Callable[[str], str], tmp_path: Path
) -> None:
    made = make_adapter(tmp_path / "f.safetensors", alphas=1.0)
    renamed = {respell(key): tensor for key, tensor in made.tensors.items()}
    assert set(renamed) != set(made.tensors)
    save_file(renamed, made.path)
    with TensorFile(made.path) as file:
        assert len(read_layout(file, name="f").entries) == len(made.deltas)


def test_names_of_compiled_and_wrapped_models_are_forgiven(tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "f.safetensors", dialect="peft", alphas=4.0)
    for wrapper in ("_orig_mod.", "module."):
        renamed = {
            k.replace("base_model.model.", f"base_model.model.{wrapper}"): v
            for k, v in made.tensors.items()
        }
        save_file(renamed, made.path)
        with TensorFile(made.path) as file:
            assert len(read_layout(file, name="f", config=made.config).entries) == len(made.deltas)


def test_a_one_by_one_convolution_fits_a_linear_layer_and_back(tmp_path: Path) -> None:
    """SD 1's proj_in is a convolution and SDXL's is linear; files exist with either shape."""
    for family in ("sd15-tiny", "sdxl-tiny"):
        path = "mid_block.attentions.0.proj_in"
        made = make_adapter(
            tmp_path / "f.safetensors",
            family=family,
            modules=[("unet", path)],
            dtype=torch.float64,
        )
        metadata = {"ss_base_model_version": FAMILIES[family].base_versions[0]}
        other = {
            k: v.flatten(1) if v.ndim == 4 else v[:, :, None, None] for k, v in made.tensors.items()
        }
        save_file(other, made.path, metadata)
        _check(made, family, "kohya")


def test_metadata_decides_between_families_that_fit_alike(tmp_path: Path) -> None:
    layers = [("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj")]
    for version, family in (("sdxl_base_v1-0", "sdxl"), ("sd_v1", "sd15"), ("", "sd15")):
        made = make_adapter(
            tmp_path / "f.safetensors",
            family="sd15",
            modules=layers,
            metadata={"ss_base_model_version": version},
        )
        with TensorFile(made.path) as file:
            layout = read_layout(file, name="f")
            assert layout.families[:2] == ("sd15", "sdxl")
            assert layout.family == family


Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def _with(**more: torch.Tensor) -> Edit:
    """Further tensors; two underscores stand for the dot that Python's names cannot hold."""
    return lambda tensors: tensors | {k.replace("__", "."): v for k, v in more.items()}


def _first(tensors: dict[str, torch.Tensor], suffix: str) -> str:
    return next(key for key in tensors if key.endswith(suffix))


def _without(suffix: str) -> Edit:
    return lambda t: {k: v for k, v in t.items() if k != _first(t, suffix)}


def _changed(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        key = _first(tensors, suffix)
        return tensors | {key: change(tensors[key]).contiguous()}

    return edit


_ONE = torch.ones(1)
_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
REFUSED: list[tuple[str, Edit, type[errors.BadAdapter], str]] = [
    ("an unknown suffix", _with(foo__bar=_ONE), errors.UnknownKeys, "foo.bar"),
    ("bundled words", _with(bundle_emb__x__clip_l=_ONE), errors.Unsupported, "bundle_emb.x.clip_l"),
    (
        "down without up",
        _without(".lora_up.weight"),
        errors.MissingKeys,
        r"1 key is missing beside its partner: lora_unet_\w+_to_q\.lora_down\.weight \(up\)$",
    ),
    ("up without down", _without(".lora_down.weight"), errors.MissingKeys, r"\(down\)"),
    (
        "alpha alone",
        _with(lora_unet_x__alpha=_ONE),
        errors.MissingKeys,
        r"lora_unet_x.alpha \(down, up\)",
    ),
    (
        "a module of no family",
        lambda t: t | {f"lora_unet_nowhere.{k.split('.', 1)[1]}": v + 1 for k, v in t.items()},
        errors.UnknownModules,
        "1 module is not in Tiny SD .*: nowhere",
    ),
    (
        "one rank and another",
        _changed(".lora_up.weight", lambda t: t[:, :2]),
        errors.ShapeMismatch,
        "up has rank 2 and down has rank 4",
    ),
    (
        "too wide for its module",
        _changed(".lora_down.weight", lambda t: t.repeat(1, 2)),
        errors.ShapeMismatch,
        r"attn1.to_q: the delta is \(96, 192\), the weight in .* is \(",
    ),
    (
        "saved without gathering",
        _changed(".lora_up.weight", lambda t: t[:0]),
        errors.ShapeMismatch,
        "an empty factor",
    ),
    (
        "a vector",
        _changed(".lora_up.weight", lambda t: t.flatten()),
        errors.ShapeMismatch,
        "is no matrix",
    ),
    (
        "a kernel in up",
        _changed(".lora_up.weight", lambda t: t[:, :, None, None].repeat(1, 1, 3, 3)),
        errors.ShapeMismatch,
        "the kernel belongs to down",
    ),
    (
        "two alphas for one module",
        _changed(".alpha", lambda t: torch.ones(2)),
        errors.ShapeMismatch,
        "not one number",
    ),
    (
        "T-LoRA",
        lambda t: (
            t
            | {f"lora_unet_x.{r}_layer.weight": torch.ones(1) for r in "qp"}
            | {"lora_unet_x.lambda_layer": torch.ones(1)}
        ),
        errors.Unsupported,
        r"it uses tlora \(1 modules\)",
    ),
    (
        "a module twice",
        lambda t: t | {k.replace("lora_unet_", "lycoris_"): v + 1 for k, v in t.items()},
        errors.BadAdapter,
        "is there twice",
    ),
]


@pytest.mark.parametrize(("what", "edit", "error", "message"), REFUSED, ids=[r[0] for r in REFUSED])
def test_a_bad_adapter_is_refused_by_name(
    what: str, edit: Edit, error: type[errors.BadAdapter], message: str, tmp_path: Path
) -> None:
    made = make_adapter(tmp_path / "f.safetensors", modules=[("unet", _Q_PATH)], alphas=1.0)
    save_file(edit(made.tensors), made.path)
    with TensorFile(made.path) as file, pytest.raises(error, match=message) as caught:
        read_layout(file, name="mine.safetensors")
    assert str(caught.value).startswith("mine.safetensors: ")


_Q_PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def test_a_file_of_another_family_is_refused_whole(tmp_path: Path) -> None:
    """A LoRA of a family we lack that shares names with one we have, with other shapes."""
    made = make_adapter(tmp_path / "f.safetensors", family="sd15-tiny")
    del FAMILIES["sd15-tiny"]
    with TensorFile(made.path) as file, pytest.raises(errors.ShapeMismatch, match="the delta is"):
        read_layout(file, name="f")


def test_a_file_of_no_family_is_refused_as_such(tmp_path: Path) -> None:
    down, up = torch.ones(4, 64), torch.ones(64, 4)
    stem = "lora_unet_other_blocks_0_attn"
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}, tmp_path / "other")
    with (
        TensorFile(tmp_path / "other") as file,
        pytest.raises(errors.UnknownModules, match="any family we know: other_blocks_0"),
    ):
        read_layout(file, name="f")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "says LOHA and its tensors are lora"),
        ({"peft_type": "XLORA"}, "X-LoRA mixes several adapters"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING trains inputs"),
        ({"peft_type": "NEWEST"}, "says NEWEST, a method that cannot be merged"),
        ({"arrow_config": {"top_k": 1}}, "Arrow"),
        ({"use_qalora": True}, "QALoRA"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which changes the base"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"lora_alpha": "8"}, "the alpha '8'"),
        ({"lora_alpha": None}, "the alpha None"),
        ({"lora_alpha": True}, "the alpha True"),
        ({"alpha_pattern": {"(a+)+": 1}}, "too costly"),
        ({"alpha_pattern": {".*.*.*.*": 1}}, "too costly"),
        ({"alpha_pattern": {"(": 1}}, "the pattern '\\('"),
    ],
)
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_configuration_that_says_more_than_lora_is_refused(
    config: dict[str, Any], message: str, place: str, tmp_path: Path
) -> None:
    inside = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})}
    made = make_adapter(
        tmp_path / "f.safetensors",
        dialect="diffusers",
        metadata=inside if place == "inside" else {},
    )
    with TensorFile(made.path) as file, pytest.raises(errors.Unsupported, match=message):
        read_layout(file, name="f", config=config if place == "beside" else None)


def test_metadata_that_is_not_json_is_refused(tmp_path: Path) -> None:
    made = make_adapter(
        tmp_path / "f.safetensors", dialect="diffusers", metadata={"lora_adapter_metadata": "{"}
    )
    with TensorFile(made.path) as file, pytest.raises(errors.Unsupported, match="is not JSON"):
        read_layout(file, name="f")


@pytest.mark.parametrize("dialect", WRITABLE_DIALECTS)
@pytest.mark.parametrize("family", ["tiny-sd", "sd15-tiny", "sdxl-tiny"])
def test_the_keys_we_write_are_those_of_the_dialect_and_lead_back(
    family: str, dialect: str, tmp_path: Path
) -> None:
    components = ["unet"] if dialect == "peft" else [*FAMILIES[family].components]
    made = make_adapter(
        tmp_path / "f.safetensors",
        family=family,
        dialect=dialect,
        modules="all",
        components=components,
        ranks=1,
        alphas=1.0,
    )
    keys = write_keys(made.deltas, dialect, family)
    assert set(keys) == set(made.deltas)
    assert {key for roles in keys.values() for key in roles.values()} == set(made.tensors)


def test_configurations_we_write_give_back_every_rank_and_alpha(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    made = make_adapter(path, dialect="peft", modules="all", ranks=[4, 2, 8], alphas=[8.0, 1.0])
    ranks = {
        m: made.tensors[f"base_model.model.{m}.lora_A.weight"].shape[0] for _, m in made.deltas
    }
    alphas = {m: made.scales["unet", m] * ranks[m] for m in ranks}
    with TensorFile(path) as file:
        layout = read_layout(file, name="f", config=peft_config(ranks, alphas))
        for entry in layout.entries:
            assert scale_of(entry, file, layout) == made.scales["unet", entry.layer.path]
    text = diffusers_config(
        {("unet", m): r for m, r in ranks.items()}, {("unet", m): a for m, a in alphas.items()}
    )
    renamed = {k.replace("base_model.model", "unet"): v for k, v in load_file(path).items()}
    save_file(renamed, path, {"lora_adapter_metadata": text})
    with TensorFile(path) as file:
        layout = read_layout(file, name="f")
        assert (layout.dialect, layout.alpha_source) == ("diffusers", "metadata")
        for entry in layout.entries:
            assert scale_of(entry, file, layout) == made.scales["unet", entry.layer.path]


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"emb_params": torch.zeros(2, 768)}, "it holds word vectors"),
        ({"<cat>": torch.zeros(768)}, "it holds word vectors"),
        (None, r"it is a checkpoint of Tiny SD \(built in\), not an adapter"),
    ],
)
def test_what_is_no_adapter_is_refused_as_what_it_is(
    tensors: dict[str, torch.Tensor] | None, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "f.safetensors"
    if tensors is None:
        shutil.copy(UNET, path)
    else:
        save_file(tensors, path)
    with TensorFile(path) as file, pytest.raises(errors.Unsupported, match=why):
        read_layout(file, name="f")


def test_a_file_whose_name_says_nothing_is_named_with_its_folder(tmp_path: Path) -> None:
    assert shown_name(tmp_path / "ink.safetensors") == "ink.safetensors"
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        assert shown_name(tmp_path / "ink" / name) == f"ink/{name}"
        assert shown_name(Path(name)) == name
        cached = tmp_path / "models--acme--ink-v2" / "snapshots" / "b775df27" / name
        assert shown_name(cached) == f"ink-v2/{name}"
