"""Train a LoRA on a Stable Diffusion pipeline: one run from configuration to result folder.

Read `train` top to bottom.
Every random choice of a step comes from `_generator(seed, purpose, number)` and nothing else, so a
run that was killed and resumed ends, on a CPU with the same number of threads, with the same bits.
"""

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from train import rendered
from train.base import Base, load_base, require_unchanged
from train.checkpoint import Identity, latest_checkpoint, restore_checkpoint, save_checkpoint
from train.config import BUILT_IN, ClassImages, TrainConfig
from train.data import Cache, Report, encode_captions, encode_images, read_folder
from train.errors import (
    BadBase,
    CannotResume,
    Interrupted,
    NonFiniteLoss,
    OutOfMemory,
    OutputExists,
    TrainError,
)
from train.evaluate import evaluate
from train.events import Clock, EventLog, Listener
from train.inject import Adapter, inject, require_gradients, round_to, untouched
from train.result import Result, write_result
from train.run import Run
from train.samples import make_samples, sample_prompts
from train.tiny import PIPELINE_DIR

CHECKPOINTS = "checkpoints"
EVENTS = "events.jsonl"
NO_CAPTION = ""


def train(
    config: TrainConfig,
    output: Path,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    base_folder: Path | None = None,
) -> Result:
    """Train, and leave the result in the new folder `output`; its state meanwhile is beside it.

    `OUTPUT.run` holds events.jsonl, the checkpoints, the caches and the samples made on the way.
    `cancelled` is asked after every step. `base_folder` is where a base that is no path was fetched.
    """
    work = _prepare(output, resume)
    log = EventLog(work / EVENTS, listener)
    try:
        return _run(config, output, work, log, cancelled, base_folder or _base_folder(config))
    except TrainError as error:
        log.emit("failed", error=error.code, message=str(error))
        raise


def _run(
    config: TrainConfig,
    output: Path,
    work: Path,
    log: EventLog,
    cancelled: Callable[[], bool],
    base_folder: Path,
) -> Result:
    started, begun = _now(), time.monotonic()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device, dtype = _hardware(config)
    log.emit("phase", what="loading the base")
    base = load_base(config.base, base_folder, device, dtype)
    report, triggers = _read_dataset(config)
    for note in (*report.warnings, *_long_captions(base, report)):
        log.emit("note", message=note)
    for example in report.examples:
        log.emit("image", name=example.name, caption=example.caption)

    resolution = config.resolution or base.resolution
    cache = Cache(work / "cache")
    data = _encode(config, base, report, triggers, resolution, cache, log)
    total = sum(parameter.numel() for parameter in base.unet.parameters())

    torch.manual_seed(config.seed)
    adapter = inject(base.unet, config.targets, config.rank, config.effective_alpha)
    optimizer = _optimizer(config, adapter)
    identity = Identity(config.digest(), report.fingerprint(), base.facts.sha256)
    checkpoints = work / CHECKPOINTS
    first, loss = restore_checkpoint(checkpoints, adapter, optimizer, identity)
    log.emit(
        "start",
        name=config.name,
        base=config.base,
        trainable=adapter.count(),
        total=total,
        modules=len(adapter.pairs),
        examples=len(report.examples),
        steps=config.steps,
        from_step=first,
        device=device.type,
        precision=str(dtype).removeprefix("torch."),
        trigger_tokens={trigger: base.tokenizer.tokenize(trigger) for trigger in triggers},
    )

    prompts = sample_prompts(config, [example.caption for example in report.examples])
    scheduler = base.noise_scheduler()
    clock = Clock()
    for step in range(first, config.steps):
        clock.start()
        try:
            loss = _step(config, step, data, base, scheduler, adapter, optimizer)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(step + 1) from error
        clock.stop()
        done = step + 1
        log.emit(
            "step",
            step=done,
            steps=config.steps,
            loss=round(loss, 6),
            learning_rate=_learning_rate(config, step),
            eta_s=clock.eta_s(config.steps - done),
        )
        stop = cancelled()
        sample_now = config.samples.every > 0 and done % config.samples.every == 0
        # Saved before sampling, so that a crash in a sample costs no training.
        if stop or done % config.checkpoint_every == 0 or done == config.steps or sample_now:
            path = save_checkpoint(checkpoints, done, loss, adapter, optimizer, identity)
            log.emit("checkpoint", step=done, path=path.name)
        if stop:
            raise Interrupted(done)
        if sample_now and done < config.steps:
            _sample_on_the_way(config, base, prompts, work / "samples", done, log)

    log.emit("phase", what="measuring")
    require_unchanged(base)
    if idle := untouched(adapter):
        log.emit("note", message=f"{len(idle)} modules are still zero, such as {idle[0]}")
    factors = round_to(adapter, getattr(torch, config.output.dtype))
    with base.autocast():
        scores = evaluate(base.pipe, config)
    log.emit("scores", **scores)
    log.emit("phase", what=f"painting {len(prompts)} samples")
    with base.autocast():
        samples = make_samples(base.pipe, prompts, config.samples, resolution)
    result = write_result(
        output,
        Run(
            config=config,
            triggers=triggers,
            base=base.facts,
            report=report,
            resolution=resolution,
            precision=str(dtype).removeprefix("torch."),
            trainable=adapter.count(),
            total=total,
            last_loss=loss,
            scores=scores,
            started=started,
            finished=_now(),
        ),
        factors,
        samples,
    )
    shutil.rmtree(checkpoints)
    shutil.rmtree(cache.folder)
    log.emit("finish", path=str(result.file.name), seconds=round(time.monotonic() - begun, 1))
    return result


@dataclass(frozen=True, slots=True)
class _Data:
    """What a step draws from: latents (n, c, h, w) and text embeddings (n, tokens, width)."""

    names: list[str]
    latents: Tensor
    texts: Tensor
    class_latents: Tensor | None
    class_texts: Tensor | None
    no_text: Tensor


def _encode(
    config: TrainConfig,
    base: Base,
    report: Report,
    triggers: tuple[str, ...],
    resolution: int,
    cache: Cache,
    log: EventLog,
) -> _Data:
    """Everything the VAE, the text encoder and the untrained UNet are needed for."""
    log.emit("phase", what=f"encoding {len(report.examples)} images")
    latents = encode_images(report.examples, base.vae, base.parts["vae"], resolution, cache)
    captions = [example.caption for example in report.examples]
    if config.class_images:
        log.emit("phase", what=f"painting {config.class_images.count} class images")
    class_latents, class_captions = _class_images(config, base, captions, triggers, cache)
    texts = encode_captions(
        [*captions, *class_captions, NO_CAPTION],
        base.tokenizer,
        base.text_encoder,
        base.parts["text_encoder"],
        cache,
    )
    return _Data(
        names=[example.name for example in report.examples],
        latents=latents,
        texts=torch.stack([texts[caption] for caption in captions]),
        class_latents=class_latents,
        class_texts=torch.stack([texts[c] for c in class_captions]) if class_captions else None,
        no_text=texts[NO_CAPTION],
    )


def _step(
    config: TrainConfig,
    step: int,
    data: _Data,
    base: Base,
    scheduler: DDPMScheduler,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
) -> float:
    """One optimizer step; the mean loss of its batch."""
    unet = base.unet
    own, prior = _batch(config, step, len(data.names))
    clean, texts = data.latents[own], data.texts[own]
    if data.class_latents is not None and data.class_texts is not None:
        chosen = [index % len(data.class_latents) for index in prior]
        clean = torch.cat([clean, data.class_latents[chosen]])
        texts = torch.cat([texts, data.class_texts[chosen]])
    names = [data.names[index] for index in own] + [f"class image {index}" for index in prior]

    generator = _generator(config.seed, "noise", step)
    noise = torch.randn(clean.shape, generator=generator)
    if config.noise_offset:
        noise = noise + config.noise_offset * torch.randn(
            (*clean.shape[:2], 1, 1), generator=generator
        )
    times = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=generator)
    dropped = torch.rand(len(clean), generator=generator) < config.caption_dropout
    texts = torch.where(dropped[:, None, None], data.no_text, texts)

    noisy = scheduler.add_noise(clean, noise, times)
    target = _target(scheduler, clean, noise, times)
    weight = _weight(config, scheduler, times)
    device, dtype = unet.device, unet.dtype
    with base.autocast():
        predicted = unet(
            noisy.to(device, dtype), times.to(device), texts.to(device, dtype)
        ).sample.float()
    errors = F.mse_loss(predicted, target.to(device), reduction="none").mean(dim=(1, 2, 3))
    losses = errors * weight.to(device)
    if not torch.isfinite(losses).all():
        bad = [
            name
            for name, loss in zip(names, losses.tolist(), strict=True)
            if not math.isfinite(loss)
        ]
        raise NonFiniteLoss(step + 1, bad)

    optimizer.zero_grad()
    loss = losses.mean()
    torch.autograd.backward(loss)
    if step == 0:
        require_gradients(adapter)
    torch.nn.utils.clip_grad_norm_(adapter.parameters(), config.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = _learning_rate(config, step)
    optimizer.step()
    return loss.item()


def _batch(config: TrainConfig, step: int, n_examples: int) -> tuple[list[int], list[int]]:
    """Which examples and which class images step number `step` uses.

    The share of class images is kept over time, not in each batch, so that it also holds for a
    batch of one. Examples come in a new order each time all of them were used.
    """
    share = config.class_images.share if config.class_images else 0.0
    prior_before, prior_after = (math.floor(n * config.batch * share) for n in (step, step + 1))
    own_before, own_after = (
        step * config.batch - prior_before,
        (step + 1) * config.batch - prior_after,
    )
    own = []
    for position in range(own_before, own_after):
        epoch, place = divmod(position, n_examples)
        order = torch.randperm(n_examples, generator=_generator(config.seed, "order", epoch))
        own.append(int(order[place]))
    return own, list(range(prior_before, prior_after))


def _target(scheduler: DDPMScheduler, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """What the UNet predicts: the noise, or the velocity of Salimans and Ho 2022 (2202.00512, D)."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return torch.as_tensor(scheduler.get_velocity(clean, noise, times))
    raise BadBase("scheduler", f"predicts {kind}; this trainer knows epsilon and v_prediction")


def _weight(config: TrainConfig, scheduler: DDPMScheduler, times: Tensor) -> Tensor:
    """(n,), min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556, section 3.4), or ones.

    min(gamma, SNR) / SNR for epsilon and min(gamma, SNR) / (SNR + 1) for v.
    """
    if config.min_snr_gamma is None:
        return torch.ones(len(times))
    kept = scheduler.alphas_cumprod[times]
    snr = kept / (1 - kept)
    capped = snr.clamp(max=config.min_snr_gamma)
    denominator = snr if scheduler.config.prediction_type == "epsilon" else snr + 1
    return torch.as_tensor(capped / denominator)


def _learning_rate(config: TrainConfig, step: int) -> float:
    """Rises over the warm-up, then follows the schedule towards the end of the run."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
    }[config.schedule]
    return config.learning_rate * factor


def _optimizer(config: TrainConfig, adapter: Adapter) -> torch.optim.Optimizer:
    parameters, rate, decay = adapter.parameters(), config.learning_rate, config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    return torch.optim.Adafactor(parameters, lr=rate, weight_decay=decay)


def _read_dataset(config: TrainConfig) -> tuple[Report, tuple[str, ...]]:
    """The examples and the words that call the adapter."""
    if config.dataset.folder is not None:
        return read_folder(config.dataset, config.dataset.folder, config.triggers), config.triggers
    report = rendered.rendered(config.dataset, config.seed)
    return report, config.triggers or (rendered.trigger(config.dataset),)


def _long_captions(base: Base, report: Report) -> list[str]:
    """Captions whose end the text encoder never sees."""
    longest = base.tokenizer.model_max_length
    lengths = [(e.name, len(base.tokenizer(e.caption).input_ids)) for e in report.examples]
    return [
        f"{name}: its caption has {length} tokens, the base reads {longest}"
        for name, length in lengths
        if length > longest
    ]


def _class_images(
    config: TrainConfig, base: Base, captions: list[str], triggers: tuple[str, ...], cache: Cache
) -> tuple[Tensor | None, list[str]]:
    """Latents the base itself makes for the class prompts, before it has an adapter."""
    wish = config.class_images
    if wish is None:
        return None, []
    prompts = list(wish.prompts) or _class_prompts(config, captions, triggers)
    chosen = [prompts[index % len(prompts)] for index in range(wish.count)]
    key = ("class", *base.parts.values(), str(config.seed), wish.model_dump_json(), *chosen)
    return cache.get(key, lambda: _paint(base, chosen, wish, config)), chosen


def _class_prompts(
    config: TrainConfig, captions: list[str], triggers: tuple[str, ...]
) -> list[str]:
    if config.dataset.folder is None:
        return rendered.known_captions()
    prompts = []
    for caption in captions:
        for trigger in triggers:
            caption = caption.replace(trigger, config.class_word or "")
        prompts.append(" ".join(caption.split()))
    return list(dict.fromkeys(prompts))


def _paint(base: Base, prompts: list[str], wish: ClassImages, config: TrainConfig) -> Tensor:
    size = config.resolution or base.resolution
    parts = []
    for start in range(0, len(prompts), config.batch):
        batch = prompts[start : start + config.batch]
        with torch.no_grad(), base.autocast():
            latents = base.pipe(
                batch,
                num_inference_steps=wish.steps,
                guidance_scale=wish.guidance,
                height=size,
                width=size,
                generator=[_generator(config.seed, "class", start + i) for i in range(len(batch))],
                output_type="latent",
            ).images
        parts.append(latents.float().cpu())
    return torch.cat(parts)


def _sample_on_the_way(
    config: TrainConfig, base: Base, prompts: list[str], folder: Path, step: int, log: EventLog
) -> None:
    """Paint; a failure is an event and not the end of the run."""
    folder.mkdir(exist_ok=True)
    try:
        with base.autocast():
            samples = make_samples(
                base.pipe, prompts, config.samples, config.resolution or base.resolution
            )
    except (RuntimeError, ValueError, MemoryError) as error:
        log.emit("sample_failed", step=step, detail=str(error))
        return
    for index, sample in enumerate(samples):
        path = folder / f"step-{step:07d}-{index}.png"
        sample.save(path)
        log.emit("sample", step=step, path=str(path), prompt=sample.prompt, seed=sample.seed)


def _now() -> float:
    """Unix seconds for the header; SOURCE_DATE_EPOCH makes files that can be made again."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    return time.time() if fixed is None else float(fixed)


def _generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator of its own for every purpose and step, whatever the device is."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _base_folder(config: TrainConfig) -> Path:
    return PIPELINE_DIR if config.base == BUILT_IN else Path(config.base)


def _hardware(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise BadBase(config.base, "the configuration asks for cuda, but torch sees no GPU")
    device = torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")
    if config.precision != "auto":
        return device, getattr(torch, config.precision)
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return device, torch.bfloat16 if has_bfloat16 else torch.float32


def _prepare(output: Path, resume: bool) -> Path:
    """The folder of the run's state; raises rather than overwrite a result or another run."""
    work = output.with_name(f"{output.name}.run")
    if output.exists():
        raise OutputExists(output, "is already there; move it away or choose another --output")
    unfinished = latest_checkpoint(work / CHECKPOINTS) is not None
    if resume and not work.is_dir():
        raise CannotResume(work, "there is no unfinished run to continue")
    if unfinished and not resume:
        raise OutputExists(work, "holds an unfinished run; continue it with --resume or remove it")
    work.mkdir(parents=True, exist_ok=True)
    if not resume:
        (work / EVENTS).unlink(missing_ok=True)
    return work
