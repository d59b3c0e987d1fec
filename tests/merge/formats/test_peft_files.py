"""Every kind of file that PEFT saves and we merge, read back: its own merged weights are the truth."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from merge.algorithms import read_change
from merge.errors import Unsupported
from merge.formats.adapters import AdapterLayout, read_config, read_layout
from merge.formats.reader import TensorFile
from merge.identify import identify


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = torch.einsum("bi,eoi->beo", x, self.gate_up_proj)[..., :5]
        return torch.einsum("bei,eoi->bo", up, self.down_proj)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.up_proj = nn.Linear(8, 12, bias=False)
        self.down_proj = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x + self.down_proj(self.up_proj(self.q_proj(x))))
        return self.experts(x) + x  # type: ignore[no-any-return]


class Tiny(nn.Module):
    """The kinds of layers that adapters change, in a model of no family."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.conv(torch.ones(1, 4, 3, 3)).sum()  # type: ignore[no-any-return]


LINEAR = ["q_proj", "up_proj", "down_proj"]
# Name -> configuration; `is_layered` ones change convolutions and embeddings too.
FILES: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=[*LINEAR, "conv", "embed"],
        rank_pattern={"up_proj": 2}, alpha_pattern={r"blocks\.1\.q_proj": 7},
    ),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=LINEAR),
    "dora": lambda: peft.LoraConfig(
        r=3, lora_alpha=6, use_dora=True, target_modules=[*LINEAR, "conv", "embed"]
    ),
    "lora with biases": lambda: peft.LoraConfig(
        r=2, lora_alpha=3, lora_bias=True, target_modules=["q_proj", "down_proj"]
    ),
    "the base's biases": lambda: peft.LoraConfig(r=2, bias="all", target_modules=["q_proj"]),
    "biases of LoRA's layers": lambda: peft.LoraConfig(
        r=2, bias="lora_only", target_modules=["q_proj"]
    ),
    "modules to save": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["head", "norm"]
    ),
    "packed experts": lambda: peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    ),
    "one packed parameter": lambda: peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["experts.down_proj"]
    ),
    "tokens": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"embed": [3, 1]}
    ),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=[*LINEAR, "conv"]),
    "loha with a core": lambda: peft.LoHaConfig(
        r=2, alpha=5, target_modules=["conv"], use_effective_conv2d=True
    ),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=[*LINEAR, "conv"]),
    "lokr of whole factors": lambda: peft.LoKrConfig(r=64, alpha=5, target_modules=LINEAR),
    "lokr decomposed": lambda: peft.LoKrConfig(
        r=1, alpha=3, decompose_both=True, decompose_factor=4, target_modules=LINEAR,
        rank_pattern={"up_proj": 2},
    ),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=5, total_step=10, target_modules=LINEAR
    ),
    "vera": lambda: peft.VeraConfig(r=3, target_modules=LINEAR),
    "ia3": lambda: peft.IA3Config(
        target_modules=[*LINEAR, "conv"], feedforward_modules=["down_proj", "conv"]
    ),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=LINEAR),
    "oft shared, exact": lambda: peft.OFTConfig(
        oft_block_size=4, target_modules=LINEAR, block_share=True, use_cayley_neumann=False
    ),
    "oft kept close": lambda: peft.OFTConfig(
        oft_block_size=4, target_modules=LINEAR, coft=True, eps=1e-3
    ),
    "boft": lambda: peft.BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["q_proj", "up_proj"]
    ),
    "glora": lambda: peft.GloraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "hra": lambda: peft.HRAConfig(r=2, target_modules=LINEAR),
    "hra, orthonormal": lambda: peft.HRAConfig(r=2, apply_GS=True, target_modules=LINEAR),
    "hira": lambda: peft.HiraConfig(r=2, target_modules=[*LINEAR, "conv"]),
    "ln tuning": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "trainable tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[5, 2], target_modules=["embed"]
    ),
}  # fmt: skip


def _save(config: peft.PeftConfig, folder: Path) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """The base's weights, and the model with an adapter of random factors that was saved."""
    torch.manual_seed(3)
    model = Tiny().double()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "ranknum" not in key:  # which is not saved
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(folder)
    return weights, wrapped


def _read(folder: Path) -> tuple[AdapterLayout, TensorFile]:
    path = folder / "adapter_model.safetensors"
    file = TensorFile(path)
    return read_layout(file, name=path.name, config=read_config(path)), file


def _merged(weights: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """The base's weights with everything our reading of the file says."""
    layout, file = _read(folder)
    assert (layout.dialect, layout.family) == ("peft", None)
    found = dict(weights)
    with file:
        for entry in layout.entries:
            path, kind = entry.layer.path, entry.layer.kind
            key = path if kind == "parameter" else f"{path}.weight"
            weight, bias = weights[key], weights.get(f"{path}.bias")
            shape = tuple(weight.shape)
            assert entry.dims.fits(shape)
            tensors = {role: file.read_tensor(name) for role, name in entry.keys.items()}
            change = read_change(entry.layout, tensors, shape, entry.facts)
            matrix = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
            delta = change.weight(0, shape[0], None if change.needs == "nothing" else matrix)
            found[key] = found[key] + delta.reshape(shape)
            added = change.bias(bias, matrix)
            assert added is None or entry.touches_bias
            if added is not None and bias is not None:
                found[f"{path}.bias"] = found[f"{path}.bias"] + added
    return found


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_saves_means_what_peft_merges(name: str, tmp_path: Path) -> None:
    weights, wrapped = _save(FILES[name](), tmp_path)
    theirs = wrapped.merge_and_unload().state_dict()  # type: ignore[operator]
    ours = _merged(weights, tmp_path)
    changed = {key for key in weights if not torch.equal(theirs[key], weights[key])}
    assert changed
    for key, weight in ours.items():
        # PEFT holds LoHa's scale in float32.
        torch.testing.assert_close(weight, theirs[key], rtol=1e-7, atol=1e-8)
        assert (key in changed) == (not torch.equal(weight, weights[key])), key


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_saves_is_described_without_refusal(name: str, tmp_path: Path) -> None:
    _save(FILES[name](), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    found = identify(path, hashes=False, config=read_config(path))
    assert (found.kind, found.dialect) == ("adapter", "peft")
    assert [warning.code for warning in found.warnings] == ["open_family"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_vera_without_its_projections_is_refused_by_name(tmp_path: Path) -> None:
    config = peft.VeraConfig(r=3, target_modules=LINEAR, save_projection=False)
    _save(config, tmp_path)
    with pytest.raises(Unsupported, match="projections are not in the file"):
        _read(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(Unsupported, match="projections are not in the file"):
        _read(tmp_path)
