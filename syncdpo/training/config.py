"""The settings of a training run, from a yaml file and from options."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

OF_RULES = ("rules", "matched", "curriculum")  # settings of losers that are made on the fly


def _setting(default, text: str):
    return field(default=default, metadata={"help": text})


class TrainingDiverged(RuntimeError):
    """The gradient stayed NaN or infinite for too many steps in a row."""


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run, with its default. Raises ValueError naming the setting at fault."""

    data: str = _setting(
        "", "cache of `syncdpo prepare` or prepare-pairs, or an LTX-2 trainer's .precomputed"
    )
    output: str = _setting("runs/train", "folder for weights, checkpoints and logs")
    model: str = _setting(
        "tiny", "tiny; LTX-2's or Kandinsky 6's folder, hub id or file; or your own module:Class"
    )
    text_encoder: str = _setting("", "file or folder of LTX-2's text encoder, where model has none")
    video_vae: str = _setting("", "file or folder of LTX-2's video VAE, where model has none")
    audio_vae: str = _setting("", "file or folder of LTX-2's audio VAE, where model has none")
    allow_distilled: bool = _setting(False, "train a distilled checkpoint all the same")
    weights: str = _setting(
        "", "start from these, all weights or a LoRA of any tool, instead of the model's own"
    )
    allow_partial: bool = _setting(False, "take what fits of a LoRA in weights, leave the rest")
    method: str = _setting("syncdpo", "sft, syncdpo, or dpo: of pairs made by prepare-pairs")
    reference: str = _setting(
        "weights", "what margins are measured against: weights as loaded, or the base without them"
    )
    steps: int = _setting(200, "optimizer steps")
    batch_size: int = _setting(16, "clips per process and micro-step")
    accumulation: int = _setting(1, "micro-steps per optimizer step")
    optimizer: str = _setting("adamw", "adamw, or adamw8bit: its moments in 8 bits")
    learning_rate: float = _setting(3e-4, "peak learning rate of AdamW")
    schedule: str = _setting("cosine", "learning rate after the warm-up: constant, linear, cosine")
    warmup: int = _setting(10, "steps to the peak learning rate")
    weight_decay: float = _setting(0.01, "weight decay of AdamW")
    max_grad_norm: float = _setting(1.0, "longer gradients are shortened to this norm")
    lora_rank: int = _setting(0, "rank of the LoRA, at least; 0 trains all weights")
    base_precision: str = _setting("bf16", "a LoRA's frozen base: bf16 (as loaded), fp8, int8, nf4")
    offload: str = _setting("none", "blocks: a LoRA's frozen base in host memory, block by block")
    trained: str = _setting("both", "whose weights: both streams', or the audio's alone (audio)")
    sigma: str = _setting("separate", "noise levels: one for each stream, or shared (Kandinsky 6)")
    shift_bound: int = _setting(0, "tokens from which LTX-2's noise levels rise no more; 0: none")
    rules: str = _setting("replace+scale", "shift, scale, warp, replace, or several joined by +")
    matched: float = _setting(0.5, "share of matched pairs")
    curriculum: str = _setting("linear", "linear, cosine, stages, constant or adaptive")
    beta_video: float = _setting(0.0, "β of the DPO loss on the video's errors")
    beta_audio: float = _setting(10.0, "β of the DPO loss on the audio's errors")
    normalize: bool = _setting(False, "divide margins by the reference's errors (β about 5)")
    logistic: str = _setting("joint", "one preference per clip (joint) or stream (separate)")
    sft_weight: float = _setting(1.0, "weight of the winner's own error")
    draws: int = _setting(0, "noise and distortions drawn per clip; 0 draws anew every time")
    cache_reference: int = _setting(0, "so many draws per clip, their reference errors made once")
    split_pair: bool = _setting(False, "backpropagate winner and loser in turn: half the memory")
    gradient_checkpointing: bool = _setting(False, "recompute activations in the backward")
    mixed_precision: str = _setting("fp32", "fp32 or bf16")
    workers: int = _setting(0, "processes that read latents ahead")
    checkpoint_every: int = _setting(100, "steps between checkpoints")
    sample_every: int = _setting(0, "steps between samples, from step 0 to the end; 0: none")
    sample_captions: str = _setting("", "what of: a .txt with a caption on each line, or a caption")
    sample_pictures: str = _setting("", "held-out cache whose pictures get a sound; not LTX-2")
    sample_count: int = _setting(4, "clips of each caption, or pictures, at every sampling")
    sample_steps: int = _setting(0, "sampling steps; 0: the model's own number")
    metric: str = _setting("", "module:function, a figure of samples of your own; more by commas")
    log_with: str = _setting("tensorboard", "tensorboard, wandb, …, several by commas, or none")
    validation: float = _setting(0.0, "share of the clips, by their names, to measure on alone")
    validation_data: str = _setting("", "cache of other clips to measure on alone")
    validate_every: int = _setting(0, "steps between validations; 0: as costs a twentieth at most")
    keep: str = _setting("last", "whose weights are left: the last step's, or the best one's")
    winner_bound: float = _setting(3.0, "the best one's error on winners, of the reference's")
    patience: int = _setting(0, "validations without a better one that end the run; 0: none do")
    resume: bool = _setting(False, "go on from the last checkpoint in output")
    push_to_hub: str = _setting("", "repository of the hub that gets the weights and their card")
    seed: int = _setting(0, "everything random follows from it")

    def __post_init__(self):
        # Here, not above: the command line lists these settings without waiting for torch.
        from syncdpo.negatives.curriculum import SCHEDULES
        from syncdpo.negatives.rules import parse_rule

        choices = {
            "method": ("sft", "syncdpo", "dpo"),
            "reference": ("weights", "base"),
            "optimizer": ("adamw", "adamw8bit"),
            "base_precision": ("bf16", "fp8", "int8", "nf4"),
            "offload": ("none", "blocks"),
            "trained": ("both", "audio"),
            "sigma": ("shared", "separate"),
            "schedule": ("constant", "linear", "cosine"),
            "logistic": ("joint", "separate"),
            "mixed_precision": ("fp32", "bf16"),
            "curriculum": tuple(SCHEDULES),
            "keep": ("last", "best"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        parse_rule(self.rules)
        if self.method == "dpo":
            self._check_no_rules()
        lowest = {"steps": 1, "batch_size": 1, "accumulation": 1, "checkpoint_every": 1}
        lowest |= dict.fromkeys(("warmup", "lora_rank", "draws", "cache_reference", "workers"), 0)
        lowest |= {"sample_every": 0, "sample_count": 1, "sample_steps": 0}
        lowest |= dict.fromkeys(("shift_bound", "validate_every", "patience"), 0)
        lowest |= dict.fromkeys(("sft_weight", "beta_video", "beta_audio"), 0)
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm", "winner_bound"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        for name, whole in (("base_precision", "bf16"), ("offload", "none")):
            if getattr(self, name) != whole and not self.lora_rank:
                raise ValueError(
                    f"{name}: expected {whole} where all weights are trained (lora_rank: 0), got "
                    f"{getattr(self, name)}; a LoRA's base is frozen, so choose a lora_rank"
                )
        if self.offload == "blocks" and not self.gradient_checkpointing:
            raise ValueError(
                "offload: blocks needs gradient_checkpointing: true, or the backward holds every "
                "block on the device"
            )
        if not 0 <= self.matched <= 1:
            raise ValueError(f"matched: expected 0 to 1, got {self.matched}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation: expected 0 to below 1, got {self.validation}")
        if self.validation and self.validation_data:
            raise ValueError(
                f"validation: expected 0 beside validation_data, got {self.validation}"
            )
        if self.draws and self.cache_reference not in (0, self.draws):
            raise ValueError(
                f"cache_reference: expected as many draws per clip as draws says, {self.draws}, "
                f"got {self.cache_reference}"
            )
        for name in ("draws", "cache_reference"):
            if getattr(self, name) and self.curriculum == "adaptive":
                raise ValueError(
                    f"{name}: expected 0 with the adaptive curriculum, got {getattr(self, name)}"
                )

    def _check_no_rules(self) -> None:
        defaults = {setting.name: setting.default for setting in fields(self)}
        for name in OF_RULES:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}: expected none with method: dpo, whose losers are on disk and made by "
                    f"no rule, got {getattr(self, name)!r}"
                )

    @property
    def compares(self) -> bool:
        """Whether the method compares winners with losers, and so asks a reference."""
        return self.method != "sft"

    @property
    def model_options(self) -> dict:
        """What `load_model` is told; what is left to its default is left out."""
        names = ("text_encoder", "video_vae", "audio_vae", "shift_bound")
        given = {name: getattr(self, name) for name in names if getattr(self, name)}
        return given | {"sigma": self.sigma, "allow_distilled": self.allow_distilled}

    @property
    def draws_per_clip(self) -> int:
        """K where noise and distortions are drawn K times per clip; 0 where every step draws."""
        return self.cache_reference or self.draws


def load_config(path: Path) -> TrainConfig:
    """A yaml file of settings. Raises ValueError for a name that is none, or a wrong type."""
    settings = yaml.safe_load(path.read_text()) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected `setting: value` lines, got {settings!r:.40}")
    return TrainConfig(**{k: _typed(k, v, path) for k, v in settings.items()})


def dump_config(config: TrainConfig) -> str:
    """Every setting as yaml, each with its meaning: a file that `load_config` reads."""
    lines = []
    for setting in fields(TrainConfig):
        value = yaml.safe_dump({setting.name: getattr(config, setting.name)}).strip()
        lines.append(f"{value:<32}# {setting.metadata['help']}")
    return "\n".join(lines) + "\n"


def _typed(name: str, value, path: Path):
    known = {f.name: type(f.default) for f in fields(TrainConfig)}
    if name not in known:
        raise ValueError(f"{path}: expected a setting, got {name!r}; there are {', '.join(known)}")
    kind = known[name]
    # YAML reads 1e-4 as text and 1 as an int; both mean the float.
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not kind:
        raise ValueError(f"{path}: {name}: expected {kind.__name__}, got {value!r}")
    return value
