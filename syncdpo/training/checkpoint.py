"""Checkpoints that are whole or not there, and a log that a resumed run continues."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import Accelerator, PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from tqdm import tqdm

from syncdpo.data.files import remove_leftovers, write_atomic
from syncdpo.models.weights import ADAPTER
from syncdpo.negatives.curriculum import Schedule
from syncdpo.training.config import TrainConfig
from syncdpo.training.optimizers import moments_of, set_moments, trained_parameters
from syncdpo.training.trackers import log_clips, start_trackers

KEPT = 2
LOG = "log.jsonl"
PATTERN = "checkpoint-*.safetensors"
BEST = "best-{:06d}.safetensors"
# Settings that may differ between a run and its continuation: they change no step.
FREE = {
    "resume", "checkpoint_every", "workers", "output", "data", "offload", "allow_partial",
    "push_to_hub", "sample_every", "sample_count", "metric", "log_with", "validation_data",
    "validate_every", "keep", "winner_bound", "patience",
}  # fmt: skip
# Full tensors on the CPU, whatever wraps the model; of a LoRA run the adapter alone.
TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
LOADED = StateDictOptions(full_state_dict=True, strict=False)


def save_checkpoint(
    config: TrainConfig,
    policy: nn.Module,
    optimizer: Optimizer,
    difficulty: Schedule,
    progress: dict,
    writes: bool,
) -> None:
    """One safetensors file with weights and optimizer state, everything else in its header.

    Every process must call it; the one that `writes` does. The last `KEPT` files stay.
    """
    weights, state = _trained_state(config, policy, optimizer)
    if not writes:
        return
    tensors = {f"weights/{name}": tensor for name, tensor in weights.items()}
    for name, moments in state.items():
        tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in moments.items()}
    header = {"config": asdict(config), "progress": progress, "difficulty": difficulty.state_dict()}
    output = Path(config.output)
    content = save({k: t.contiguous() for k, t in tensors.items()}, {"syncdpo": json.dumps(header)})
    write_atomic(output / f"checkpoint-{progress['step']:06d}.safetensors", content)
    for old in sorted(output.glob(PATTERN))[:-KEPT]:
        old.unlink()
    _forget_best(output, progress)


def load_checkpoint(
    config: TrainConfig, policy: nn.Module, optimizer: Optimizer, difficulty: Schedule
) -> dict:
    """Progress so far, {"step", "seconds", "cpu_seconds", "skipped", "validation"}; zeros, and
    nothing of a validation, for a fresh run.

    Raises ValueError where a fresh run would overwrite checkpoints, or a resumed one has other
    settings than its beginning.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    found = sorted(output.glob(PATTERN))
    if found and not config.resume:
        raise ValueError(f"output: {output} holds a run; resume it, or choose another folder")
    if not found:
        return {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "skipped": 0, "validation": None}
    remove_leftovers(output)
    header, tensors = _header(found[-1]), load_file(found[-1])
    _check_same_run(header["config"], asdict(config), output)
    weights = {k.partition("/")[2]: t for k, t in tensors.items() if k.startswith("weights/")}
    moments = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            name, _, moment = rest.rpartition("/")
            moments.setdefault(name, {})[moment] = tensor
    if config.optimizer == "adamw8bit":
        set_model_state_dict(policy, weights, options=LOADED)
        set_moments(policy, optimizer, moments)
    else:
        groups = get_optimizer_state_dict(policy, optimizer)["param_groups"]
        set_state_dict(
            policy,
            optimizer,
            model_state_dict=weights,
            optim_state_dict={"state": moments, "param_groups": groups},
            options=LOADED,
        )
    difficulty.load_state_dict(header["difficulty"])
    progress = {"validation": None} | header["progress"]
    _check_best(config, progress)
    return progress


def save_best(
    config: TrainConfig, policy: nn.Module, progress: dict, step: int, writes: bool
) -> None:
    """What `finished_weights` are after `step` steps, on disk. Every process must call it.

    Beside it stay the best ones that checkpoints speak of: a run that goes on from one of them has
    its best one still, whatever was found, and lost, after that.
    """
    weights = finished_weights(config, policy)
    if writes:
        content = save({name: tensor.contiguous() for name, tensor in weights.items()})
        write_atomic(_best_file(config, step), content)
        _forget_best(Path(config.output), progress)


def best_weights(config: TrainConfig, step: int) -> dict[str, Tensor]:
    """What `save_best` wrote for that step. Raises ValueError where it is gone."""
    path = _best_file(config, step)
    if not path.is_file():
        raise ValueError(
            f"keep: expected the best weights in {path}, which are gone; `keep: last` saves those "
            "of the last step"
        )
    return load_file(path)


def _check_best(config: TrainConfig, progress: dict) -> None:
    """Where the best weights so far are not on disk, and wanted, there is no best so far."""
    best = (progress["validation"] or {}).get("best")
    if not best or config.keep != "best" or _best_file(config, best["step"]).is_file():
        return
    progress["validation"]["best"] = None
    if PartialState().is_main_process:
        print(
            f"keep: the weights of step {best['step']}, the best so far, are not in "
            f"{config.output}; the best is looked for from step {progress['step']} on",
            file=sys.stderr,
        )


def _best_file(config: TrainConfig, step: int) -> Path:
    return Path(config.output) / BEST.format(step)


def _forget_best(output: Path, progress: dict) -> None:
    """Remove the best weights of steps that neither this run nor a checkpoint calls the best."""
    found = list(output.glob(BEST.replace("{:06d}", "*")))
    if not found:  # most runs keep none, and need not read their checkpoints again
        return
    headers = [_header(path)["progress"] for path in output.glob(PATTERN)]
    bests = [(p.get("validation") or {}).get("best") for p in (progress, *headers)]
    wanted = {BEST.format(best["step"]) for best in bests if best}
    for path in found:
        if path.name not in wanted:
            path.unlink()


def _header(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["syncdpo"])


def _trained_state(
    config: TrainConfig, policy: nn.Module, optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Trained weights, and the optimizer's state for each of them, by their names."""
    if config.optimizer == "adamw8bit":
        weights = get_model_state_dict(policy, options=TRAINED)
        state = moments_of(policy, optimizer)
    else:
        weights, state = get_state_dict(policy, optimizer, options=TRAINED)
        state = state.get("state", {})  # full on the one process that writes
    if config.base_precision == "nf4":  # which lists its scales beside the weights
        trained = {name for name, _ in trained_parameters(policy)}
        weights = {name: tensor for name, tensor in weights.items() if name in trained}
    return weights, state


def run_settings(folder: Path) -> dict:
    """The settings that a run was last started with; none before its first checkpoint."""
    found = sorted(folder.glob(PATTERN))
    return _header(found[-1])["config"] if found else {}


def finished_weights(config: TrainConfig, policy: nn.Module) -> dict[str, Tensor]:
    """What a run leaves, frozen or not: all weights, or the whole LoRA.

    Every process must call it.
    """
    adapter = f".{ADAPTER}."
    ours = [p for n, p in policy.named_parameters() if not config.lora_rank or adapter in n]
    frozen = not all(parameter.requires_grad for parameter in ours)
    return get_model_state_dict(policy, options=replace(TRAINED, ignore_frozen_params=not frozen))


def _check_same_run(then: dict, now: dict, output: Path) -> None:
    then = asdict(TrainConfig()) | then  # it may have begun before there were as many
    changed = [k for k in now if k not in FREE and then[k] != now[k]]
    if changed:
        differences = ", ".join(f"{k} was {then[k]!r}, is {now[k]!r}" for k in changed)
        raise ValueError(f"resume: the run in {output} has other settings: {differences}")


class Log:
    """A line of JSON per step in log.jsonl, trackers beside it, and a progress bar.

    Other lines tell what was found after so many steps: {"step": 40, "validation": {…}}.
    watch: is shown every line, and whether it is new: those of before `step`, which a run that
        goes on keeps, are not.
    """

    def __init__(
        self,
        config: TrainConfig,
        step: int,
        accelerator: Accelerator,
        progress: bool,
        watch: Callable[[dict, bool], None] = lambda row, new: None,
    ):
        self.writes, self.accelerator = accelerator.is_main_process, accelerator
        self.began, self.watch = step, watch
        self.shown: dict[str, str] = {}
        self.bar = tqdm(
            total=config.steps,
            initial=step,
            desc=config.method,
            unit="step",
            disable=not (progress and self.writes),
        )
        self.before: list[dict] = []
        if not self.writes:
            return
        path = Path(config.output) / LOG
        # What a killed run wrote after its last checkpoint happens once more.
        rows = read_rows(path.parent) if step else []
        self.before = [row for row in rows if row["step"] < step + (not is_step(row))]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in self.before).encode())
        self.file = path.open("a")
        start_trackers(accelerator, config, step)
        for row in self.before:
            self.watch(row, False)
            for kind in row.keys() - {"step"} if row["step"] == step and not is_step(row) else ():
                self._draw(step, kind, row[kind])  # TensorBoard forgets it with the steps to come

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        if not self.writes:
            return
        self._write({"step": step} | metrics)
        self._draw(step, "train", metrics)
        shown = {"loss": "loss", "accuracy": "implicit_accuracy", "difficulty": "difficulty"}
        self.shown |= {
            label: f"{metrics[name]:.3f}" for label, name in shown.items() if name in metrics
        }
        self.bar.set_postfix(self.shown)
        self.bar.update()

    def known(self, kind: str) -> set[int]:
        """After how many steps an earlier part of this run noted figures of a kind."""
        return {row["step"] for row in self.before if kind in row}

    def found(
        self, step: int, kind: str, figures: dict, shown: dict[str, str] | None = None
    ) -> None:
        """What was found after `step` steps; `shown` stands in the progress bar from then on."""
        if not self.writes:
            return
        self._write({"step": step, kind: figures})
        self._draw(step, kind, figures)
        self.shown |= shown or {}
        self.bar.set_postfix(self.shown)

    def clips(self, step: int, paths: list[Path]) -> None:
        """Clips that the model made after `step` steps, to the trackers that show them."""
        log_clips(self.accelerator, step, paths)

    def close(self) -> None:
        self.bar.close()
        if self.writes:
            self.file.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _draw(self, step: int, kind: str, figures: dict) -> None:
        numbers = {k: v for k, v in figures.items() if isinstance(v, (int, float))}
        named = {f"{kind}/{name}": value for name, value in numbers.items()}
        self.accelerator.log(named, step=step)

    def _write(self, row: dict) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.watch(row, True)


def read_rows(folder: Path) -> list[dict]:
    """All lines of a run's log that are whole; none where there is no log yet."""
    path = folder / LOG
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def read_log(folder: Path) -> list[dict[str, float]]:
    """The log of a run, a dictionary per step."""
    return [row for row in read_rows(folder) if is_step(row)]


def read_figures(folder: Path, kind: str) -> list[tuple[int, dict]]:
    """(steps done, figures) of a kind, as `samples`, by step."""
    return [(row["step"], row[kind]) for row in read_rows(folder) if kind in row]


def is_step(row: dict) -> bool:
    """Whether a line of the log is of a training step."""
    return not any(isinstance(value, dict) for value in row.values())
