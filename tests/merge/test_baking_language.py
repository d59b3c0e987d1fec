"""Tiny language models: logits with PEFT's adapter at work against those of the baked model, reloaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.errors import BadRecipe, ShapeMismatch, UnknownKeys, UnknownModules, Unsupported
from merge.plan import plan
from tests.fixtures.engine import make_recipe, run

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries say about tiny models

LINEAR = ["q_proj", "v_proj", "o_proj", "down_proj"]
IDS = torch.arange(10)[None] * 7 % 90


def _llama(**fields: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=96,
            **fields,
        )
    )


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 96, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def _gpt() -> Any:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 96, "n_positions": 32}
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes))


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=96,
            num_local_experts=4,
        )
    )


def _neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            vocab_size=96,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _phi3() -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(
        Phi3Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=96,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _tied() -> Any:
    return _llama(tie_word_embeddings=True)


Case = tuple[Callable[[], Any], str, dict[str, Any]]
CASES: dict[str, Case] = {
    "lora": (_llama, "LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": LINEAR}),
    "rslora with patterns": (
        *(_llama, "LoraConfig"),
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "dora": (_llama, "LoraConfig", {"r": 4, "use_dora": True, "target_modules": LINEAR}),
    "embedding and head": (
        *(_llama, "LoraConfig"),
        {"r": 4, "target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    ),
    "loha": (_llama, "LoHaConfig", {"r": 3, "alpha": 5, "target_modules": LINEAR}),
    "lokr": (_llama, "LoKrConfig", {"r": 3, "alpha": 5, "target_modules": LINEAR}),
    "oft": (_llama, "OFTConfig", {"oft_block_size": 8, "target_modules": LINEAR}),
    "boft": (
        *(_llama, "BOFTConfig"),
        {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": LINEAR[:3]},
    ),
    "vera": (_llama, "VeraConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "ia3": (
        *(_llama, "IA3Config"),
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "hra": (_llama, "HRAConfig", {"r": 4, "target_modules": LINEAR}),
    "hira": (_llama, "HiraConfig", {"r": 4, "target_modules": LINEAR}),
    "adalora": (
        *(_llama, "AdaLoraConfig"),
        {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": LINEAR},
    ),
    "modules to save": (
        *(_llama, "LoraConfig"),
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    ),
    "norms": (_llama, "LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "tokens": (
        *(_llama, "LoraConfig"),
        {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
    ),
    "conv1d": (
        *(_gpt2, "LoraConfig"),
        {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "square conv1d": (
        *(_gpt2, "LoraConfig"),
        {"r": 4, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True},
    ),
    "conv1d of gpt": (
        *(_gpt, "LoraConfig"),
        {"r": 4, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True},
    ),
    "conv1d dora": (
        *(_gpt2, "LoraConfig"),
        {"r": 4, "use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "conv1d and biases": (
        *(_gpt2, "LoraConfig"),
        {"r": 4, "target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
    ),
    "interleaved heads": (_neox, "LoraConfig", {"r": 4, "target_modules": ["query_key_value"]}),
    "packed projections": (
        *(_phi3, "LoraConfig"),
        {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj"]},
    ),
    "experts": (
        *(_mixtral, "LoraConfig"),
        {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ),
    "experts with patterns": (
        *(_mixtral, "LoraConfig"),
        {
            "r": 2,
            "target_modules": [],
            "target_parameters": ["experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {"experts.down_proj": 5},
        },
    ),
    "glora": (_llama, "GloraConfig", {"r": 4, "target_modules": LINEAR}),
    "glora and biases": (
        *(_neox, "GloraConfig"),
        {"r": 4, "config_D_E": "vector", "target_modules": ["query_key_value", "dense"]},
    ),
    "new biases": (
        *(_llama, "LoraConfig"),
        {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
    ),
    "tied head": (_tied, "LoraConfig", {"r": 4, "target_modules": ["lm_head"]}),
    "tied embedding": (_tied, "LoraConfig", {"r": 4, "target_modules": ["embed_tokens"]}),
    "tied tokens": (
        *(_tied, "LoraConfig"),
        {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
    ),
    "tied head and tokens": (
        *(_tied, "LoraConfig"),
        {"r": 4, "target_modules": ["lm_head"], "trainable_token_indices": [3, 7]},
    ),
}


REFUSED: dict[str, Case] = {
    "saved conv1d": (
        *(_gpt2, "LoraConfig"),
        {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj"], "fan_in_fan_out": True},
    ),
    "dora head": (_llama, "LoraConfig", {"use_dora": True, "target_modules": ["lm_head"]}),
}


def _make(
    folder: Path, name: str, *, embeddings: bool | str = False, **options: Any
) -> tuple[Any, torch.Tensor]:
    """The base and the adapter on disk, the base's class, and the logits with the adapter at work."""
    import peft

    make, config, fields = (CASES | REFUSED)[name]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(folder / "base", **options)
    adapted = peft.get_peft_model(model, getattr(peft, config)(**fields)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    with torch.no_grad():
        live = adapted(input_ids=IDS).logits
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=embeddings)
    return type(model), live


def _logits(kind: Any, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = kind.from_pretrained(folder).eval()(input_ids=IDS).logits
    return found


def _adapter(folder: Path) -> Path:
    return folder / "adapter" / "adapter_model.safetensors"


@pytest.mark.parametrize("name", list(CASES))
def test_the_baked_model_answers_as_the_live_one(name: str, tmp_path: Path) -> None:
    kind, live = _make(tmp_path, name)
    run(tmp_path / "out", [(_adapter(tmp_path), 1.0)], base=tmp_path / "base")
    baked, before = _logits(kind, tmp_path / "out"), _logits(kind, tmp_path / "base")
    torch.testing.assert_close(baked, live, rtol=0, atol=3e-6)
    assert (live - before).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["lora", "experts", "tied head"])
def test_shards_and_their_index_stay_whole(name: str, tmp_path: Path) -> None:
    kind, live = _make(tmp_path, name, max_shard_size="20KB")
    run(tmp_path / "out", [(_adapter(tmp_path), 1.0)], base=tmp_path / "base")
    torch.testing.assert_close(_logits(kind, tmp_path / "out"), live, rtol=0, atol=3e-6)
    held: dict[str, str] = {}
    size = 0
    for shard in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(shard)
        held |= dict.fromkeys(tensors, shard.name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == size
    assert ("lm_head.weight" in held) == (name != "experts" or "lm_head.weight" in held)


def test_an_untied_model_says_so_and_keeps_the_rest(tmp_path: Path) -> None:
    _make(tmp_path, "tied head")
    run(tmp_path / "out", [(_adapter(tmp_path), 1.0)], base=tmp_path / "base")
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "out")
    )
    assert after == before | {"tie_word_embeddings": False}
    tensors, old = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "base"))
    assert tensors.keys() - old.keys() == {"lm_head.weight"}
    assert all(torch.equal(tensors[key], tensor) for key, tensor in old.items())
    assert not torch.equal(tensors["lm_head.weight"], old["model.embed_tokens.weight"])


def test_an_embedding_of_a_tied_model_leaves_the_head_as_it_was(tmp_path: Path) -> None:
    _make(tmp_path, "tied embedding")
    run(tmp_path / "out", [(_adapter(tmp_path), 1.0)], base=tmp_path / "base")
    tensors, old = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "base"))
    assert torch.equal(tensors["lm_head.weight"], old["model.embed_tokens.weight"])
    assert not torch.equal(tensors["model.embed_tokens.weight"], old["model.embed_tokens.weight"])


def test_a_tied_head_without_a_configuration_is_refused(tmp_path: Path) -> None:
    _make(tmp_path, "tied head")
    single = tmp_path / "single.safetensors"
    shutil.copy(tmp_path / "base" / "model.safetensors", single)
    with pytest.raises(UnknownModules, match="lm_head"):
        plan(*make_recipe([(_adapter(tmp_path), 1.0)], base=single))


@pytest.mark.parametrize("name", ["embedding and head", "tied head", "tied embedding"])
def test_embeddings_that_are_saved_beside_their_factors(name: str, tmp_path: Path) -> None:
    """PEFT does so unless it is told not to."""
    kind, live = _make(tmp_path, name, embeddings="auto")
    saved = [key for key in load_file(_adapter(tmp_path)) if key.endswith(".base_layer.weight")]
    assert saved
    run(tmp_path / "out", [(_adapter(tmp_path), 1.0)], base=tmp_path / "base")
    torch.testing.assert_close(_logits(kind, tmp_path / "out"), live, rtol=0, atol=3e-6)


def test_magnitudes_of_a_head_that_is_saved_beside_them_are_refused(tmp_path: Path) -> None:
    """They would have to be of the weight in the adapter and not of that in the base."""
    _make(tmp_path, "dora head", embeddings="auto")
    with pytest.raises(UnknownKeys, match=r"lm_head\.base_layer\.weight"):
        plan(*make_recipe([(_adapter(tmp_path), 1.0)], base=tmp_path / "base"))


def test_conv1d_in_a_file_without_a_configuration(tmp_path: Path) -> None:
    """A square c_proj shows nothing, but c_attn beside it does."""
    kind, live = _make(tmp_path, "square conv1d")
    single = tmp_path / "single.safetensors"
    shutil.copy(tmp_path / "base" / "model.safetensors", single)
    run(tmp_path / "o.safetensors", [(_adapter(tmp_path), 1.0)], base=single)
    shutil.copy(tmp_path / "o.safetensors", tmp_path / "base" / "model.safetensors")
    torch.testing.assert_close(_logits(kind, tmp_path / "base"), live, rtol=0, atol=3e-6)


def test_a_conv1d_is_not_replaced(tmp_path: Path) -> None:
    _make(tmp_path, "saved conv1d")
    with pytest.raises(Unsupported, match=r"attn\.c_proj replaces a Conv1D"):
        plan(*make_recipe([(_adapter(tmp_path), 1.0)], base=tmp_path / "base"))


def test_factors_of_more_experts_than_the_base_has_are_refused(tmp_path: Path) -> None:
    _make(tmp_path, "experts")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 1}))
    with pytest.raises(ShapeMismatch, match=r"of 8 experts, and the base has 4"):
        plan(*make_recipe([(_adapter(tmp_path), 1.0)], base=tmp_path / "base"))


def test_packed_experts_and_the_same_experts_one_by_one(tmp_path: Path) -> None:
    """Factors that transformers 5 trains, beside those that its older models were trained with."""
    _make(tmp_path, "experts")
    stem = "model.layers.0.block_sparse_moe.experts.1.w3"
    generator = torch.Generator().manual_seed(2)
    down, up = (torch.randn(size, generator=generator) for size in ((2, 32), (48, 2)))
    (tmp_path / "one").mkdir()
    one = tmp_path / "one" / "adapter_model.safetensors"
    keys = (f"base_model.model.{stem}.lora_{letter}.weight" for letter in "AB")
    save_file(dict(zip(keys, (down, up), strict=True)), one)
    (tmp_path / "one" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    )
    run(tmp_path / "packed", [(_adapter(tmp_path), 1.0)], base=tmp_path / "base")
    run(tmp_path / "out", [(_adapter(tmp_path), 1.0), (one, -0.5)], base=tmp_path / "base")
    packed, both = (load_file(tmp_path / n / "model.safetensors") for n in ("packed", "out"))
    packed[f"{stem}.weight"] -= 0.5 * up @ down
    for key, tensor in packed.items():
        torch.testing.assert_close(both[key], tensor, rtol=0, atol=1e-6)


WRAPPERS = ["model.language_model.layers.", "language_model.model.layers.", "layers."]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_layers_are_found_behind_other_wrappers(wrapper: str, tmp_path: Path) -> None:
    """A language model inside a model that sees, as transformers named it before and after 4.52."""
    _make(tmp_path, "lora")
    state = load_file(tmp_path / "base" / "model.safetensors")
    renamed = {key.replace("model.layers.", wrapper): tensor for key, tensor in state.items()}
    seeing = {"vision_tower.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)}
    save_file(renamed | seeing, tmp_path / "single.safetensors")
    run(
        tmp_path / "o.safetensors",
        [(_adapter(tmp_path), 1.0)],
        base=tmp_path / "single.safetensors",
    )
    run(tmp_path / "out", [(_adapter(tmp_path), 1.0)], base=tmp_path / "base")
    plain = load_file(tmp_path / "out" / "model.safetensors")
    after = load_file(tmp_path / "o.safetensors")
    for key, tensor in plain.items():
        assert torch.equal(after[key.replace("model.layers.", wrapper)], tensor), key
    assert torch.equal(after["vision_tower.layers.0.self_attn.q_proj.weight"], torch.ones(32, 32))


def test_two_tensors_that_a_path_could_mean_are_none(tmp_path: Path) -> None:
    _make(tmp_path, "lora")
    state = load_file(tmp_path / "base" / "model.safetensors")
    twice = {key.replace("model.", "language_model.model."): t.clone() for key, t in state.items()}
    other = {key.replace("model.", "transformer."): t for key, t in state.items()}
    save_file(twice | other, tmp_path / "single.safetensors")
    with pytest.raises(UnknownModules, match="q_proj"):
        plan(*make_recipe([(_adapter(tmp_path), 1.0)], base=tmp_path / "single.safetensors"))


def test_biases_are_created_where_the_class_has_a_switch_for_them(tmp_path: Path) -> None:
    _make(tmp_path, "new biases")
    run(tmp_path / "out", [(_adapter(tmp_path), 1.0)], base=tmp_path / "base")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (True, True)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    biases = {key: tensor for key, tensor in tensors.items() if key.endswith(".bias")}
    changed = {key for key, tensor in biases.items() if tensor.any()}
    assert len(biases) == 2 * (4 + 3)
    assert changed == {
        f"model.layers.{n}.{m}.bias" for n in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")
    }


def test_biases_are_refused_where_the_class_would_not_load_them(tmp_path: Path) -> None:
    _make(tmp_path, "new biases")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "mistral"}))
    with pytest.raises(Unsupported, match=r"down_proj a bias"):
        plan(*make_recipe([(_adapter(tmp_path), 1.0)], base=tmp_path / "base"))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "gemma2", "granite"])
def test_the_switches_are_those_of_the_libraries_own_classes(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from merge.additions import _SWITCHES

    for switch, (kinds, ends) in _SWITCHES.items():
        if kind not in kinds:
            continue
        config = AutoConfig.for_model(kind, num_hidden_layers=1, **{switch: True})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        biased = {
            n.removesuffix(".bias") for n, _ in model.named_parameters() if n.endswith("bias")
        }
        assert {name.removeprefix("model.layers.0.") for name in biased} == set(ends)


def test_a_strength_reaches_replacements_too(tmp_path: Path) -> None:
    _make(tmp_path, "modules to save")
    out = tmp_path / "out"
    run(out, [(_adapter(tmp_path), 0.5)], base=tmp_path / "base", numerics="reproducible")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "out"))
    values = load_file(_adapter(tmp_path))["base_model.model.lm_head.weight"]
    halfway = (before["lm_head.weight"].double() + values.double()) / 2
    torch.testing.assert_close(after["lm_head.weight"], halfway.float(), rtol=0, atol=1e-7)


def test_a_merge_of_what_is_no_family_is_no_bake(tmp_path: Path) -> None:
    _make(tmp_path, "dora")
    with pytest.raises((Unsupported, BadRecipe)):
        plan(*make_recipe([(_adapter(tmp_path), 1.0)]))
