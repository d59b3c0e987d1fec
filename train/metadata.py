"""The header strings of a trained file: what kohya's tools, ModelSpec readers and hubs look for.

reference: kohya-ss/sd-scripts v0.10.1 (ss_*, sshs_*), ModelSpec 1.0.1 (modelspec.*).
Absolute paths are never written; `privacy` decides about folder names and caption words.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime

from torch import Tensor

from merge.formats.metadata import GRAFT_BASE_SHA256, GRAFT_TRIGGERS, GRAFT_VERSION
from merge.formats.writer import aligned_order, describe, layout, raw_bytes
from train.keys import Factors, diffusers_metadata
from train.run import Run

# Raised when the same configuration gives other weights than before.
TRAINER = "1"
LEGACY_START, LEGACY_BYTES = 0x100000, 0x10000


def file_metadata(run: Run, factors: Factors, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Every string of the header, ready to write with `tensors`."""
    kohya = _kohya(run)
    data_sha256, hashes = _data_hashes(tensors, kohya)
    metadata = {
        "format": "pt",
        **kohya,
        **hashes,
        **_modelspec(run, data_sha256),
        **_graft(run),
    }
    if run.config.output.dialect == "diffusers":
        metadata["lora_adapter_metadata"] = diffusers_metadata(
            list(factors), run.config.rank, run.alpha
        )
    return metadata


def _kohya(run: Run) -> dict[str, str]:
    config = run.config
    rate = str(config.learning_rate)
    optimizer = {
        "adamw": "torch.optim.adamw.AdamW",
        "adafactor": "torch.optim._adafactor.Adafactor",
    }
    n_class = config.class_images.count if config.class_images else 0
    own = config.batch * (1 - config.class_images.share if config.class_images else 1)
    batches = max(1, round(len(run.report.examples) / own))
    folder = _dataset_name(run)
    tags = {folder: run.report.tag_counts()} if config.output.privacy != "minimal" else {}
    return {
        "ss_base_model_version": run.base.base_version,
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(run.alpha),
        "ss_network_args": json.dumps({"targets": config.targets}),
        "ss_network_dropout": "None",
        "ss_session_id": str(int(config.digest()[:8], 16)),
        "ss_training_started_at": str(run.started),
        "ss_training_finished_at": str(run.finished),
        "ss_output_name": config.name,
        "ss_learning_rate": rate,
        "ss_unet_lr": rate,
        "ss_text_encoder_lr": "None",
        "ss_num_train_images": str(len(run.report.examples)),
        "ss_num_reg_images": str(n_class),
        "ss_num_batches_per_epoch": str(batches),
        "ss_num_epochs": str(-(-config.steps // batches)),
        "ss_epoch": str(-(-config.steps // batches)),
        "ss_steps": str(config.steps),
        "ss_max_train_steps": str(config.steps),
        "ss_batch_size_per_device": str(config.batch),
        "ss_total_batch_size": str(config.batch),
        "ss_resolution": f"({run.resolution}, {run.resolution})",
        "ss_enable_bucket": "False",
        "ss_bucket_info": "null",
        "ss_tag_frequency": json.dumps(tags, ensure_ascii=False),
        "ss_dataset_dirs": json.dumps(
            {folder: {"n_repeats": 1, "img_count": len(run.report.examples)}}
        ),
        "ss_sd_model_name": run.base.label,
        "ss_sd_model_hash": run.base.sha256[:8],
        "ss_new_sd_model_hash": run.base.sha256,
        "ss_seed": str(config.seed),
        "ss_cache_latents": "True",
        "ss_mixed_precision": "bf16" if run.precision == "bfloat16" else "no",
        "ss_gradient_checkpointing": "False",
        "ss_gradient_accumulation_steps": "1",
        "ss_optimizer": f"{optimizer[config.optimizer]}(weight_decay={config.weight_decay})",
        "ss_lr_scheduler": config.schedule,
        "ss_lr_warmup_steps": str(round(config.warmup * config.steps)),
        "ss_max_grad_norm": str(config.max_grad_norm),
        "ss_noise_offset": str(config.noise_offset),
        "ss_min_snr_gamma": str(config.min_snr_gamma),
        "ss_caption_dropout_rate": str(config.caption_dropout),
        "ss_prior_loss_weight": "1.0" if config.class_images else "0.0",
        "ss_training_comment": f"trigger: {', '.join(run.triggers)}",
    }


def _modelspec(run: Run, data_sha256: str) -> dict[str, str]:
    config = run.config
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{run.base.architecture}/lora",
        "implementation": "diffusers",
        "title": config.title or config.name,
        "resolution": f"{run.resolution}x{run.resolution}",
        "description": config.description,
        "author": config.output.author or "",
        "date": datetime.fromtimestamp(run.finished, UTC).isoformat(timespec="seconds"),
        "hash_sha256": f"0x{data_sha256}",
        "license": config.output.license,
        "usage_hint": f"Put {' or '.join(run.triggers)} into the prompt.",
        "tags": ", ".join(config.output.tags),
        "trigger_phrase": ", ".join(run.triggers),
        "prediction_type": "v" if run.base.prediction_type == "v_prediction" else "epsilon",
        "timestep_range": "0,999",
        "unet_dtype": config.output.dtype,
    }
    return {f"modelspec.{name}": value for name, value in fields.items() if value}


def _graft(run: Run) -> dict[str, str]:
    config = run.config
    fields = {
        GRAFT_VERSION: TRAINER,
        GRAFT_TRIGGERS: json.dumps(run.triggers, ensure_ascii=False),
        GRAFT_BASE_SHA256: run.base.sha256,
        "graft.base": run.base.label,
        "graft.family": run.base.family,
        "graft.algorithm": "lora",
        "graft.merge_semantics": "additive",
        "graft.targets": config.targets,
        "graft.config_digest": f"sha256:{config.digest()}",
        "graft.dataset_fingerprint": f"sha256:{run.report.fingerprint()}",
        "graft.dataset_count": str(len(run.report.examples)),
        "graft.seed": str(config.seed),
        "graft.scores": json.dumps(run.scores, sort_keys=True),
        "graft.privacy": config.output.privacy,
    }
    if config.class_word:
        fields["graft.class_word"] = config.class_word
    if config.dataset.license:
        fields["graft.dataset_license"] = config.dataset.license
    return fields


def _dataset_name(run: Run) -> str:
    """The last part of the folder's path, the renderer's term, or a neutral word."""
    dataset = run.config.dataset
    if dataset.folder is None:
        return f"renderer-{dataset.style or dataset.concept}"
    return dataset.folder.name if run.config.output.privacy == "full" else "dataset"


def _data_hashes(
    tensors: Mapping[str, Tensor], kohya: Mapping[str, str]
) -> tuple[str, dict[str, str]]:
    """SHA-256 of the tensor region, and kohya's strings with it.

    The legacy hash is 8 digits of the 64 KiB at 1 MiB of a file with only the ss_* strings.
    Shorter files get none: the hash of nothing would make them all look alike.
    """
    described = aligned_order([(key, *describe(tensor)) for key, tensor in tensors.items()])
    data = b"".join(bytes(raw_bytes(tensors[key])) for key, _, _ in described)
    assert data, "a file without tensors has no hash worth writing"
    digest = hashlib.sha256(data).hexdigest()
    hashes = {"sshs_model_hash": digest}
    window = (layout(described, kohya).head + data)[LEGACY_START : LEGACY_START + LEGACY_BYTES]
    if window:
        hashes["sshs_legacy_hash"] = hashlib.sha256(window).hexdigest()[:8]
    return digest, hashes
