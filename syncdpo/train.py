"""Post-train a joint video-audio generator: SFT, SyncDPO, or DPO of given pairs. One flat script.

SyncDPO (arXiv 2605.12179) prefers a synchronised clip over the same clip with its timing distorted
by a rule. How this script simplifies and departs from it:

- Pairs that somebody has (`dpo`, of `syncdpo prepare-pairs`) go the same way as those made here,
  with the same noise levels and noise.
- Latents are encoded beforehand (`syncdpo prepare`); rules distort latents, not raw media.
- Half of the pairs are *matched* by default: winner and loser both distorted, the winner in step.
- The reference is the adapter switched off, or as it was loaded (LoRA), a frozen copy (full
  weights), or a table of its errors made once (`cache_reference`), after which no reference model
  is needed at all.
- One optimizer, AdamW, its moments in 32 bits or 8; no moving average of the weights. Held-out
  figures are of fixed draws, by forwards alone (`training/validation.py`).

Everything random is a pure function of (seed, step): which clips, which σ, which ε, which
distortion. So a run that was killed goes on with the same losses, and N processes train on what one
process with the same global batch trains on.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from syncdpo import ops
from syncdpo.data.buckets import buckets_of, commonest, take_format
from syncdpo.data.precomputed import open_latents
from syncdpo.models import Conditions, Model, Streams, load_model
from syncdpo.models.quantised import quantise
from syncdpo.models.weights import holds_lora
from syncdpo.negatives import Pairs, given_pairs
from syncdpo.negatives.curriculum import Adaptive, curriculum
from syncdpo.training import publish
from syncdpo.training.adapter import (
    as_reference,
    keep_reference,
    loaded_adapter,
    merge_adapter,
    train_adapter,
)
from syncdpo.training.checkpoint import (
    Log,
    best_weights,
    finished_weights,
    load_checkpoint,
    save_best,
    save_checkpoint,
)
from syncdpo.training.config import TrainConfig, TrainingDiverged
from syncdpo.training.dice import Dice, Order, Roll
from syncdpo.training.given import check_pairs, split_batch
from syncdpo.training.optimizers import make_optimizer
from syncdpo.training.samples import Samples, waiting
from syncdpo.training.sharding import check_shardable, keep_precision, place_frozen, place_trained
from syncdpo.training.trackers import tracker_names
from syncdpo.training.validation import Validation, hold_out
from syncdpo.training.watchdog import Watchdog

PRECISION = {"fp32": "no", "bf16": "bf16"}  # accelerate's names
PATIENCE = 10  # steps in a row without a finite gradient before the run stops


def train(
    config: TrainConfig,
    model: Model | None = None,
    data: Dataset | None = None,
    *,
    held_out: Dataset | None = None,
    progress: bool = True,
) -> dict:
    """Run `config`: weights, log and checkpoints go to `config.output`.

    model, data: instead of those that `config` names; `data` gives what `model.encode` does.
    held_out: clips to validate on, instead of `validation` or `validation_data`.

    Returns {"steps", "seconds", "cpu_seconds", "skipped", "kept_step", "warnings"}: the step whose
    weights were saved, and what the watchdog said, to the main process alone. Raises ValueError for
    settings or data that do not fit, TrainingDiverged when no step counts any more; the last good
    checkpoint is then in place.
    """
    publish.check(config)
    accelerator = Accelerator(
        mixed_precision=PRECISION[config.mixed_precision],
        log_with=tracker_names(config) or None,
        project_dir=config.output,
        kwargs_handlers=waiting(config),
    )
    keep_precision(accelerator)
    check_shardable(config, accelerator)
    model = model or load_model(config.model, **config.model_options)
    writes = accelerator.is_main_process
    about = publish.about(config, model) if writes else {}
    samples = Samples(config, model, accelerator)
    base = load_start(config, model, writes)
    if data is None:
        data = open_latents(config.data, model, progress=progress and writes)
        if writes and hasattr(data, "summary"):  # whatever is left out, and why
            print(data.summary, file=sys.stderr)
    check_pairs(config, data, "data", writes)
    data, held_out = hold_out(config, model, data, held_out, progress and writes)
    policy, reference = policy_and_reference(config, model, base, accelerator.device)
    optimizer = make_optimizer(config, policy.parameters())
    # Modules reach their device here; sharded ones (FSDP2) in pieces, never whole.
    policy, optimizer = place_trained(config, accelerator, policy, optimizer)
    reference = reference and place_frozen(accelerator, reference)
    difficulty = curriculum(config.curriculum)
    state = load_checkpoint(config, policy, optimizer, difficulty)
    buckets = buckets_of(data)
    samples.bucket = commonest(buckets)
    order = Order(config, len(data), accelerator, buckets)
    dice = Dice(config, model, difficulty, order, accelerator.device)
    learner = Learner(config, accelerator, model, policy, reference, progress and writes)
    del reference  # the learner's alone: once its errors are known, it goes
    keep_best = partial(save_best, config, policy, state, writes=writes)
    validation = Validation(config, model, held_out, accelerator, state, keep_best)
    state["validation"] = validation.state
    if config.compares and config.reference == "base":
        with learner._reference() as base:
            validation.against(base)
    if config.cache_reference and config.compares:
        learner.cache_reference(data, dice)
    micro_steps = order.micro_steps(state["step"])
    batches = iter(DataLoader(data, batch_sampler=micro_steps, num_workers=config.workers))
    watchdog = Watchdog(config, len(data), accelerator.num_processes)
    log = Log(config, state["step"], accelerator, progress, watchdog)

    streak, since = 0, {name: now - state[name] for name, now in clocks().items()}
    if not state["step"]:
        validation(0, policy, log)

    for step in range(state["step"], config.steps):
        if validation.out_of_patience:
            break
        with off_the_clock(since):
            samples.take(step, log)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(config, step)
        sums = []
        for micro in range(config.accumulation):
            batch = {k: v.to(accelerator.device) for k, v in next(batches).items()}
            last = micro == config.accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(policy):
                sums.append(learner.backward(batch, dice.roll(step, micro)))
        metrics = mean_over_processes(accelerator, sums)
        norm = accelerator.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        if math.isfinite(metrics["loss"] + norm):
            optimizer.step()
            streak = 0
        else:
            state["skipped"] += 1
            streak += 1
        optimizer.zero_grad()
        if isinstance(difficulty, Adaptive) and not streak:
            difficulty.update(metrics["implicit_accuracy"])
        log(step, metrics | {"grad_norm": norm, "skipped": state["skipped"]})
        state |= {name: now - since[name] for name, now in clocks().items()} | {"step": step + 1}
        if streak == PATIENCE:
            raise TrainingDiverged(
                f"no finite gradient in {PATIENCE} steps, the last of them {step}; the last good "
                f"checkpoint is in {config.output}. Try a lower learning_rate or beta."
            )
        validation(state["step"], policy, log)
        ends = state["step"] == config.steps or validation.out_of_patience
        if not streak and (state["step"] % config.checkpoint_every == 0 or ends):
            save_checkpoint(config, policy, optimizer, difficulty, state, writes)

    samples.take(state["step"], log, last=True)
    kept = validation.kept_step(state["step"])
    if kept == state["step"]:
        weights = finished_weights(config, policy)
    elif writes:
        weights = best_weights(config, kept)
    if writes:
        about |= {"step": str(kept)}  # of the weights
        model.save_weights(Path(config.output), weights, about=about)
        publish.write_card(config, about, len(data))
        watchdog.sum_up()
    log.close()
    accelerator.wait_for_everyone()
    if writes and config.push_to_hub:
        print(publish.upload(Path(config.output), config.push_to_hub), file=sys.stderr)
    told = {"kept_step": kept, "warnings": watchdog.said}
    return {"steps": state["step"]} | {k: state[k] for k in (*since, "skipped")} | told


# --- what is trained ------------------------------------------------------------------------------


def load_start(config: TrainConfig, model: Model, writes: bool) -> nn.Module | None:
    """Put `weights` into the model; → a frozen copy of what it was, where that is the reference.

    A LoRA that stays one needs no copy: it can be switched off.
    """
    if not config.weights:
        return None
    base, path = None, Path(config.weights)
    against_base = config.compares and config.reference == "base"
    if against_base and not (config.lora_rank and holds_lora(path)):
        base = frozen_copy(model.transformer)
    # A LoRA in float32, however the model is stored, so that no bit of it is lost.
    note = model.load_weights(path, allow_partial=config.allow_partial, dtype=torch.float32)
    if note and writes:
        print(note, file=sys.stderr)
    return base


def policy_and_reference(
    config: TrainConfig,
    model: Model,
    base: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, nn.Module | None]:
    """The module to train, and a frozen copy where no adapter's absence or copy can serve as one.

    device: where the base is quantised, if it is; policy and reference are so alike.

    A LoRA that `weights` brought is trained on; where all weights are to be trained, it is merged
    into them. What either is measured against, `reference` says: `weights` as they were loaded,
    or `base`, the model without them.
    """
    policy, reference = model.transformer, base
    loaded = loaded_adapter(policy) is not None
    wanted = model.of_audio if config.trained == "audio" else lambda name: True
    if config.gradient_checkpointing:
        recompute_activations(policy)
    for module in filter(None, (policy, base)):
        quantise(module, config.base_precision, device)
    if config.lora_rank:
        train_adapter(policy, config.lora_rank, model.lora_targets, wanted, config.seed)
    else:
        check_untied(policy)
        merge_adapter(policy)
        if config.compares and reference is None:
            reference = frozen_copy(policy)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and wanted(name))
        if parameter.requires_grad:  # AdamW's small steps are lost on bf16 weights
            parameter.data = parameter.data.float()
    if config.lora_rank and loaded and config.reference == "weights":
        keep_reference(policy)
    return policy.train(), reference


def recompute_activations(transformer: nn.Module) -> None:
    """Raises ValueError for one that has no way to."""
    if not hasattr(transformer, "enable_gradient_checkpointing"):
        raise ValueError(
            "gradient_checkpointing: expected false, or a transformer with a method "
            f"enable_gradient_checkpointing(), which {type(transformer).__name__} has not"
        )
    transformer.enable_gradient_checkpointing()


def check_untied(transformer: nn.Module) -> None:
    """Raises ValueError where one weight has two names, which safetensors does not store."""
    names: dict[nn.Parameter, str] = {}
    for name, parameter in transformer.named_parameters(remove_duplicate=False):
        if names.setdefault(parameter, name) != name:
            raise ValueError(
                f"lora_rank: expected a LoRA of {type(transformer).__name__}, whose {name} is its "
                f"{names[parameter]} too, which no file of all weights can hold, got 0"
            )


def frozen_copy(transformer: nn.Module) -> nn.Module:
    return copy.deepcopy(transformer).requires_grad_(False).eval()


@dataclass
class Learner:
    """The methods: from a batch to gradients in `policy`, and numbers for the log."""

    config: TrainConfig
    accelerator: Accelerator
    model: Model
    policy: nn.Module
    reference: nn.Module | None
    progress: bool
    reference_errors: Tensor | None = None  # [draws, clips, streams, win and lose]

    def backward(self, batch: dict[str, Tensor], roll: Roll) -> dict[str, Tensor]:
        take_format(self.model, roll.bucket)
        if self.config.compares:
            return self._preference(*self._pairs(batch, roll), roll)
        clean, _, conditions = split_batch(batch)
        return self._sft(clean, conditions, roll)

    def _sft(self, clean: Streams, conditions: Conditions, roll: Roll) -> dict[str, Tensor]:
        """L = Σ_streams mean (v − (ε − x))²."""
        noise = [ops.noise(x.shape, roll.seed, stream=m) for m, x in enumerate(clean)]
        noisy = tuple(
            torch.lerp(x.float(), e, _like(s, x)).to(x.dtype)
            for x, e, s in zip(clean, noise, roll.sigma, strict=True)
        )
        prediction = self._velocity(self.policy, noisy, roll.sigma, conditions)
        sign = self.model.velocity_sign
        errors = [
            (p.float() - sign * (e - x.float())).square().mean()
            for p, e, x in zip(prediction, noise, clean, strict=True)
        ]
        loss = sum(errors)
        self.accelerator.backward(loss / self.config.accumulation)
        return {"loss": loss, "video_error": errors[0], "audio_error": errors[1]}

    def _pairs(self, batch: dict[str, Tensor], roll: Roll) -> tuple[Pairs, Conditions]:
        """SyncDPO's are made here, of clips; the others come with the batch."""
        win, lose, conditions = split_batch(batch)
        return roll.pairs.make(*win) if roll.pairs else given_pairs(win, lose), conditions

    def _preference(self, pairs: Pairs, conditions: Conditions, roll: Roll) -> dict[str, Tensor]:
        """L = dpo_loss over the pair, both halves in one pass or one after the other."""
        inputs = self._noised(pairs, conditions, roll)
        known = anchor = None
        if self.reference_errors is not None:
            known = self.reference_errors[roll.stage, roll.clips].permute(1, 2, 0).flatten(1)
        else:
            with torch.no_grad(), self._reference() as reference:
                anchor = self._velocity(reference, *inputs)
        loss_of = partial(self._loss, pairs, roll, anchor, known)
        if self.config.split_pair:
            loss, stats = self._backward_halves(loss_of, inputs)
        else:
            loss, stats = loss_of(self._velocity(self.policy, *inputs))
            self.accelerator.backward(loss / self.config.accumulation)
        return {
            "loss": loss.detach(),
            "implicit_accuracy": stats.implicit_accuracy,
            "margin": stats.margin.sum(0).mean(),
            "video_error_win": stats.policy_win[0].mean(),
            "video_error_lose": stats.policy_lose[0].mean(),
            "audio_error_win": stats.policy_win[1].mean(),
            "audio_error_lose": stats.policy_lose[1].mean(),
            "video_reference_win": stats.reference_win[0].mean(),
            "audio_reference_win": stats.reference_win[1].mean(),
            **({"difficulty": pairs.difficulty.mean()} if roll.pairs else {}),
            "valid": pairs.valid.float().mean(),
        }

    def _backward_halves(self, loss_of: Callable, inputs: tuple) -> tuple[Tensor, ops.DPOStats]:
        """∂L/∂v needs no graph through the network; with it, each half is backpropagated alone."""
        with torch.no_grad():
            prediction = self._velocity(self.policy, *inputs)
        prediction = [p.detach().requires_grad_() for p in prediction]
        loss, stats = loss_of(prediction)
        gradients = torch.autograd.grad(loss / self.config.accumulation, prediction)
        pairs = len(gradients[0]) // 2
        for half, quiet in ((slice(0, pairs), True), (slice(pairs, None), False)):
            with self.accelerator.no_sync(self.policy) if quiet else contextlib.nullcontext():
                output = self._velocity(self.policy, *_select(inputs, half))
                torch.autograd.backward(output, [g[half] for g in gradients])
        return loss, stats

    def _loss(
        self, pairs: Pairs, roll: Roll, anchor, known, prediction
    ) -> tuple[Tensor, ops.DPOStats]:
        sign, config = self.model.velocity_sign, self.config
        target = [
            ops.Velocity(win if lose is win else torch.cat([win, lose]), roll.seed, m, sign)
            for m, (win, lose) in enumerate(zip(pairs.win, pairs.lose, strict=True))
        ]
        if anchor is not None:
            anchor = [a.to(p.dtype) for a, p in zip(anchor, prediction, strict=True)]
        return ops.dpo_loss(
            prediction,
            anchor,
            target,
            beta=(config.beta_video, config.beta_audio),
            reference_error=known,
            pair_weight=pairs.valid.float(),
            logistic=config.logistic,
            normalize="reference" if config.normalize else None,
            sft_weight=config.sft_weight,
            return_stats=True,
        )

    def _noised(self, pairs: Pairs, conditions: Conditions, roll: Roll) -> tuple:
        """Arguments of the velocity for winners, then losers: the same σ and ε for both."""
        # A stream that both share is read and noised once.
        lose = [None if y is x else y for x, y in zip(pairs.win, pairs.lose, strict=True)]
        noisy = ops.paired_noise(pairs.win, lose, roll.sigma, roll.seed)
        sigma = tuple(torch.cat([s, s]) for s in roll.sigma)
        return tuple(noisy), sigma, {k: torch.cat([v, v]) for k, v in conditions.items()}

    def _velocity(self, transformer, noisy: Streams, sigma: Streams, conditions) -> Streams:
        with self.accelerator.autocast():
            return self.model.velocity(transformer, noisy, sigma, conditions)

    @contextlib.contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        if self.reference is not None:
            yield self.reference
            return
        with as_reference(self.accelerator.unwrap_model(self.policy)):
            yield self.policy

    @torch.no_grad()
    def cache_reference(self, data: Dataset, dice: Dice) -> None:
        """The reference's error on every clip and draw, once; then let the reference go.

        Noise and distortions are functions of (clip, draw), so these are four numbers per draw.
        """
        config, size = self.config, len(data)
        jobs = list(itertools.product(range(config.cache_reference), dice.order.shares()))
        # The last row is for clips that only fill a batch up.
        errors = torch.zeros(config.cache_reference, size + 1, 2, 2, device=dice.device)
        for stage, share in tqdm(jobs, "reference", disable=not self.progress):
            clips = [clip for clip, _ in share]
            places = [clip if counts else size for clip, counts in share]
            batch = default_collate([data[i] for i in clips])
            batch = {name: x.to(errors.device) for name, x in batch.items()}
            roll = dice.draw(stage, clips)
            take_format(self.model, roll.bucket)
            pairs, conditions = self._pairs(batch, roll)
            with self._reference() as reference:
                prediction = self._velocity(reference, *self._noised(pairs, conditions, roll))
            nothing = torch.zeros(2, 2 * len(clips), device=errors.device)
            _, stats = self._loss(pairs, roll, None, nothing, prediction)
            halves = torch.stack([stats.policy_win, stats.policy_lose], dim=-1)
            errors[stage, places] = halves.transpose(0, 1)
        self.reference_errors = self.accelerator.reduce(errors, "sum")[:, :size]
        self.reference = None


# --- small parts ----------------------------------------------------------------------------------


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Linear warm-up to 1, then constant, or down to 0 at the end."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return shapes[config.schedule]


def clocks() -> dict[str, float]:
    """Time that passes, and that this process's threads work: on a busy machine they differ."""
    return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}


@contextlib.contextmanager
def off_the_clock(since: dict[str, float]) -> Iterator[None]:
    """What passes meanwhile is no training: samples."""
    before = clocks()
    yield
    for name, now in clocks().items():
        since[name] += now - before[name]


def mean_over_processes(accelerator: Accelerator, metrics: list[dict[str, Tensor]]) -> dict:
    """Means over micro-steps and processes, as numbers."""
    table = torch.stack([torch.stack([v.float() for v in m.values()]) for m in metrics]).mean(0)
    return dict(zip(metrics[0], accelerator.reduce(table, "mean").tolist(), strict=True))


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (x.ndim - 1))


def _select(inputs: tuple, half: slice) -> tuple:
    """One half of the arguments that `Learner._noised` makes."""
    noisy, sigma, conditions = inputs
    return (
        tuple(x[half] for x in noisy),
        tuple(s[half] for s in sigma),
        {name: x[half] for name, x in conditions.items()},
    )
