"""Whether a model does what training asks of it: every member called on a made clip, and compared.

What no call can settle is left open, and said to be: the sign of the velocity, say, shows in
trained weights alone.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn

from syncdpo import ops
from syncdpo.data.chance import generator
from syncdpo.data.clips import Clip
from syncdpo.data.files import canonical_json
from syncdpo.models.adapters import add_adapter, remove_adapters
from syncdpo.models.lora_keys import lora_settings
from syncdpo.models.members import STREAMS, check_members
from syncdpo.models.protocol import Conditions, Model, Streams
from syncdpo.models.weights import ADAPTER, lora_pairs

BATCH = 2
DRAWS = 64  # of the noise levels
IMPULSES = 5  # in each stream
BURST = 0.01  # s of noise, 40 dB above what is around it
ALIKE = {torch.float32: 1e-3}  # by how much of its size a row may differ with the rows beside it
ALIKE_IN_HALF = 3e-2  # the same, of 16 bits
TOLD = 0.1  # correlation of the velocity with ε − x from which its sign is told
LARGEST = 2e9  # parameters up to which all weights are written out and read again
RANK = 2


@dataclass(frozen=True)
class Finding:
    """What was found of one member: `passed`, None where that stays open, and a sentence."""

    member: str
    passed: bool | None
    sentence: str

    def __str__(self) -> str:
        mark = {True: "ok", False: "FAILS", None: "open"}[self.passed]
        return f"{mark:<7}{self.member:<14}{self.sentence}"


class Fault(Exception):
    """What a member does that it should not."""


class Untold(Exception):
    """Why something cannot be said."""


def check_model(model: Model, *, caption: str = "", generates: bool = True) -> list[Finding]:
    """Call every member of `model`, and hold what it returns against `syncdpo.models.Model`.

    caption: for `encode` and `generate`. generates: whether to make clips, in two steps.

    Raises ValueError, as `load_model` does, where a member is missing or of another type. Weights,
    and what of them is trained, are afterwards as before.
    """
    check_members(model)
    at_hand = Contract(model, caption)
    checks = {
        "transformer": at_hand.transformer_is_a_module,
        "identity": at_hand.identity_tells,
        "encode": at_hand.encode_fits_the_timelines,
        "timelines": at_hand.impulses_are_where_they_are,
        "draw_sigma": at_hand.levels_are_of_the_generator,
        "velocity": at_hand.velocity_is_of_the_transformer,
        "  each row": at_hand.rows_are_apart,
        "velocity_sign": at_hand.sign_shows,
        "of_audio": at_hand.audio_is_a_part,
        "lora_targets": at_hand.lora_acts,
        "save_weights": at_hand.weights_return,
        "  a LoRA": at_hand.lora_returns,
    }
    if generates:
        checks["generate"] = at_hand.clips_are_of_their_seeds
    return [_found(member, check) for member, check in checks.items()]


def _found(member: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(member, True, check())
    except Untold as why:
        return Finding(member, None, str(why))
    except Fault as fault:
        return Finding(member, False, str(fault))
    except Exception as error:  # of the model's own making
        return Finding(member, False, f"raises {type(error).__name__}: {error}")


def demand(holds: bool | Tensor, fault: str) -> None:
    if not holds:
        raise Fault(fault)


class Contract:
    """A model, latents of a made clip, and one method for what each member must do.

    Each returns what it found, or raises `Fault`, or `Untold`.
    """

    def __init__(self, model: Model, caption: str):
        self.model, self.caption = model, caption

    # --- clips and latents ------------------------------------------------------------------------

    def transformer_is_a_module(self) -> str:
        transformer = self.model.transformer
        kind = type(transformer).__name__
        demand(isinstance(transformer, nn.Module), f"expected a torch.nn.Module, got {kind}")
        demand(transformer is self.model.transformer, "expected the same one every time, got two")
        count = sum(parameter.numel() for parameter in transformer.parameters())
        demand(count, f"expected weights in {kind}, got none")
        return f"{kind}, {count:,} weights"

    def identity_tells(self) -> str:
        identity = self.model.identity()
        demand(isinstance(identity, dict), f"expected a dict, got {type(identity).__name__}")
        demand(identity, "expected what latents depend on, got nothing: every cache would do")
        try:
            text = canonical_json(identity)
        except (TypeError, ValueError) as error:
            raise Fault(f"expected values that JSON has, got others ({error})") from error
        demand(text == canonical_json(self.model.identity()), "expected the same every time")
        if hasattr(self.model, "set_format"):
            lacking = vars(self.model.clip_format).keys() - identity.keys()
            demand(not lacking, f"expected clip_format in it, got no {', '.join(sorted(lacking))}")
        return f"caches are told apart by {', '.join(identity)}"

    @cached_property
    def latents(self) -> dict[str, Tensor]:
        return self.model.encode(quiet_clip(self.model), self.caption)

    def encode_fits_the_timelines(self) -> str:
        again = self.model.encode(quiet_clip(self.model), self.caption)
        for place, (stream, line) in enumerate(zip(STREAMS, self.model.timelines, strict=True)):
            demand(stream in self.latents, f"expected {stream!r}, got {', '.join(self.latents)}")
            latents = self.latents[stream]
            demand(latents.is_floating_point(), f"expected floats as {stream}, got {latents.dtype}")
            long, axis = line.frames * line.tokens, line.dim - 1
            demand(
                0 <= axis < latents.ndim and latents.shape[axis] == long,
                f"expected {stream} of {long} ({line.frames} frames of {line.tokens} tokens, says "
                f"timelines[{place}]) on axis {axis}, for one clip has no batch axis, got "
                f"{list(latents.shape)}",
            )
        for name, tensor in self.latents.items():
            demand(tensor.isfinite().all(), f"expected finite numbers in {name}")
            demand(
                torch.equal(tensor, again[name]),
                f"expected the same {name} of the same clip (of a VAE's distribution, its mode)",
            )
        return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.latents.items())

    def impulses_are_where_they_are(self) -> str:
        """An impulse at t changes most the latents of the frame that is at t by its timeline."""
        told = []
        for stream, line in zip(STREAMS, self.model.timelines, strict=True):
            lag = self._lag(stream)
            side = "late" if lag > 0 else "early"
            demand(
                abs(lag) * line.rate < 0.5,
                f"expected an impulse in the {stream} at its own time, got it "
                f"{abs(lag) * 1000:.0f} ms too {side} on average (which a causal encoder that was "
                "never trained may do by itself)",
            )
            told.append(f"{stream} {lag * 1000:+.0f} of {1000 / line.rate:.0f} ms a frame")
        return f"impulses are found at their own time: {', '.join(told)}"

    def _lag(self, stream: str) -> float:
        """Seconds by which the frames that change most are late, on average."""
        line = self.model.timelines[STREAMS.index(stream)]
        if line.frames < IMPULSES:
            raise Untold(f"{line.frames} frames of {stream} are too few to find an impulse in")
        clip, late = quiet_clip(self.model), []
        for part in range(1, IMPULSES + 1):
            frame = torch.tensor(round(part * (line.frames - 1) / (IMPULSES + 1)))
            when = line.seconds(frame.double()).item()
            struck = self.model.encode(with_impulse(clip, stream, when), self.caption)[stream]
            change = (struck.double() - self.latents[stream].double()).square()
            change = line.as_frames(change[None]).movedim(line.dim, 0).flatten(1).sum(1)
            demand(change.any(), f"expected an impulse to change the {stream}, nothing did")
            late.append(line.seconds(change.argmax().double()).item() - when)
        return sum(late) / len(late)

    # --- what training calls ----------------------------------------------------------------------

    def levels_are_of_the_generator(self) -> str:
        sigma, again = (self.model.draw_sigma(DRAWS, generator("contract")) for _ in range(2))
        demand(len(sigma) == 2, f"expected levels for picture and sound, got {len(sigma)} tensors")
        for stream, levels, same in zip(STREAMS, sigma, again, strict=True):
            kind = f"{levels.dtype} {list(levels.shape)} on {levels.device}"
            demand(
                kind == f"torch.float32 [{DRAWS}] on cpu",
                f"expected torch.float32 [{DRAWS}] on cpu for {stream}, got {kind}",
            )
            low, high = levels.min().item(), levels.max().item()
            demand(low > 0 and high <= 1, f"expected 0 < σ ≤ 1, got {low:g} to {high:g}")
            demand(torch.equal(levels, same), "expected a function of the generator, got another")
        return "one level for both streams" if torch.equal(*sigma) else "a level for each stream"

    def velocity_is_of_the_transformer(self) -> str:
        """Of the latents' shape, by the transformer that is given, with a gradient."""
        clean, noisy, sigma, conditions = self._noised()
        watched = Watched(self.model.transformer.eval())
        trained = [p for p in watched.transformer.parameters() if p.is_floating_point()]
        with _all_trainable(trained), torch.enable_grad():
            velocity = self.model.velocity(watched, noisy, sigma, conditions)
            demand(watched.calls, "expected a call of the transformer that it is given, got none")
            for stream, v, x in zip(STREAMS, velocity, clean, strict=True):
                got = list(v.shape)
                demand(v.shape == x.shape, f"expected {stream} of {list(x.shape)}, got {got}")
                demand(v.isfinite().all(), f"expected finite numbers in {stream}")
            loss = sum(v.float().square().mean() for v in velocity)
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        idle = sum(gradient is None for gradient in gradients)
        demand(idle < len(trained), "expected a gradient in the transformer's weights, got none")
        calls = "one call" if watched.calls == 1 else f"{watched.calls} calls"
        told = f"of the latents' shapes, by {calls} of the transformer"
        without = f"; of {len(trained)} weights {idle} without a part in it, which DDP refuses"
        return told + without * (idle > 0)

    @torch.no_grad()
    def rows_are_apart(self) -> str:
        """A clip's velocity is its own, at its own noise level, whatever is in the batch."""
        _, noisy, sigma, conditions = self._noised()
        transformer = self.model.transformer.eval()
        together = self.model.velocity(transformer, noisy, sigma, conditions)
        for row in range(BATCH):
            one = slice(row, row + 1)
            own = {name: x[one] for name, x in conditions.items()}
            levels, latents = tuple(s[one] for s in sigma), tuple(x[one] for x in noisy)
            alone = self.model.velocity(transformer, latents, levels, own)
            for stream, v, expected in zip(STREAMS, together, alone, strict=True):
                size = expected.float().norm().clamp_min(torch.finfo(torch.float32).tiny)
                apart = ((v[one] - expected).float().norm() / size).item()
                demand(
                    apart <= ALIKE.get(v.dtype, ALIKE_IN_HALF),
                    f"expected row {row} of the {stream} to be what it is alone, whatever rows and "
                    f"noise levels are beside it, got it {apart:.1%} apart",
                )
        return "a clip's velocity is the same alone and in a batch of other noise levels"

    @torch.no_grad()
    def sign_shows(self) -> str:
        """The correlation of the velocity with ε − x, which is near ±1 for trained weights."""
        clean, noisy, sigma, conditions = self._noised(level=0.5)
        velocity = self.model.velocity(self.model.transformer.eval(), noisy, sigma, conditions)
        both = []
        for v, x, e in zip(velocity, clean, self._noise(clean), strict=True):
            pair = torch.stack([v.float().flatten(), (e - x.float()).flatten()])
            both.append(torch.corrcoef(pair)[0, 1].nan_to_num())
        score, sign = (sum(both) / len(both)).item(), self.model.velocity_sign
        told = f"the velocity's correlation with ε − x is {score:+.2f}"
        if abs(score) < TOLD:
            raise Untold(f"{sign:+d}, which these weights do not show ({told}): they are untrained")
        demand(score * sign > 0, f"expected {-sign:+d}, for {told}, got {sign:+d}")
        return f"{sign:+d}: {told}"

    def _noised(self, level: float | None = None) -> tuple[Streams, Streams, Streams, Conditions]:
        """Clean latents, (1−σ)·x + σ·ε, σ of each row's own or `level`, and conditions."""
        device = next(self.model.transformer.parameters()).device
        batch = {name: torch.stack([x] * BATCH).to(device) for name, x in self.latents.items()}
        clean = tuple(batch.pop(stream) for stream in STREAMS)
        sigma = self.model.draw_sigma(BATCH, generator("contract"))
        if level is not None:
            sigma = tuple(torch.full_like(s, level) for s in sigma)
        sigma = tuple(s.to(device) for s in sigma)
        noisy = tuple(
            torch.lerp(x.float(), e, s.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)
            for x, e, s in zip(clean, self._noise(clean), sigma, strict=True)
        )
        return clean, noisy, sigma, batch

    def _noise(self, clean: Streams) -> list[Tensor]:
        seeds = torch.arange(1, BATCH + 1, device=clean[0].device)
        return [ops.noise(x.shape, seeds, stream=m) for m, x in enumerate(clean)]

    # --- weights ----------------------------------------------------------------------------------

    def audio_is_a_part(self) -> str:
        names = [name for name, _ in self.model.transformer.named_parameters()]
        audio = [name for name in names if self.model.of_audio(name)]
        if not audio:
            raise Untold("False of all weights, so that `trained: audio` would train nothing")
        demand(len(audio) < len(names), "expected False of the picture's weights, got True of all")
        return f"True of {len(audio)} of {len(names)} weights, {audio[0]} among them"

    def lora_acts(self) -> str:
        """A LoRA on the targets changes the velocity, in the mode for sampling too."""
        names = self._targets()
        _, *inputs = self._noised()
        transformer = self.model.transformer.eval()
        with torch.no_grad():
            before = self.model.velocity(transformer, *inputs)
            with self._lora(names):
                after = self.model.velocity(transformer.eval(), *inputs)
        demand(
            any(not torch.equal(b, a) for b, a in zip(before, after, strict=True)),
            f"expected a LoRA on {names[0]} and others to change the velocity, nothing did: layers "
            "must be called, not their weights read (torch.nn.MultiheadAttention reads them, and "
            "torch.nn.TransformerEncoderLayer without gradients)",
        )
        audio = sum(map(self.model.of_audio, names))
        return f"{len(names)} linear layers, {audio} of them the audio's; a LoRA there acts"

    def _targets(self) -> list[str]:
        transformer = self.model.transformer
        ends = tuple(f".{target}" for target in self.model.lora_targets)
        names = [name for name, _ in transformer.named_modules() if f".{name}".endswith(ends)]
        given = ", ".join(self.model.lora_targets)
        demand(names, f"expected ends of modules' names, got {given}, which none has")
        for name in names:
            kind = type(transformer.get_submodule(name))
            demand(
                issubclass(kind, nn.Linear),
                f"expected linear layers, got {name}, which is {kind.__name__}",
            )
        return names

    @contextlib.contextmanager
    def _lora(self, names: list[str]) -> Iterator[dict[str, Tensor]]:
        """A LoRA of random numbers on those layers, as its state dict; off again in the end."""
        transformer, source = self.model.transformer, generator("contract")
        asked = {p: p.requires_grad for p in transformer.parameters()}
        add_adapter(transformer, LoraConfig(**lora_settings(dict.fromkeys(names, RANK))), ADAPTER)
        for parameter in transformer.parameters():
            if parameter not in asked:
                random = torch.randn(parameter.shape, generator=source)
                parameter.data.copy_(random)
        try:
            state = transformer.state_dict()
            yield {name: x.clone() for name, x in state.items() if ".lora_" in name}
        finally:
            if getattr(transformer, "peft_config", None):
                remove_adapters(transformer)
            for parameter, wanted in asked.items():
                parameter.requires_grad_(wanted)

    def weights_return(self) -> str:
        """All weights, written out, changed, and read again."""
        transformer = self.model.transformer
        count = sum(parameter.numel() for parameter in transformer.parameters())
        if count > LARGEST:
            raise Untold(f"{count / 1e9:.1f} billion weights are not written out for a test")
        state = {name: x.detach().clone() for name, x in transformer.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            self._save(Path(folder), state)
            for parameter in transformer.parameters():
                parameter.add_(1)
            try:
                self._load(Path(folder))
                found = transformer.state_dict()
                wrong = [name for name, x in state.items() if not torch.equal(found[name], x)]
            finally:
                transformer.load_state_dict(state)
        demand(not wrong, f"expected load_weights to bring back {', '.join(wrong[:3])}")
        return "load_weights brings back what save_weights wrote, bit for bit"

    def lora_returns(self) -> str:
        """A LoRA, written out, taken off, and read again, as its matrices."""
        with tempfile.TemporaryDirectory() as folder, self._lora(self._targets()) as state:
            self._save(Path(folder), state)
            remove_adapters(self.model.transformer)
            self._load(Path(folder))
            found, expected = lora_pairs(self.model.transformer.state_dict()), lora_pairs(state)
            demand(
                found.keys() == expected.keys(),
                f"expected load_weights to bring back a LoRA of {len(expected)} layers, got one of "
                f"{len(found)}",
            )
            for name, pair in expected.items():
                same = all(torch.equal(a.to(b), b) for a, b in zip(found[name], pair, strict=True))
                demand(same, f"expected load_weights to bring back the matrices of {name}")
        return "load_weights brings back the one that save_weights wrote"

    def _save(self, folder: Path, state: dict[str, Tensor]) -> None:
        self.model.save_weights(folder, state, about={"method": "syncdpo"})
        demand(list(folder.glob("*.safetensors")), "expected a .safetensors file in the folder")

    def _load(self, folder: Path) -> None:
        told = self.model.load_weights(folder, allow_partial=False, dtype=torch.float32)
        got = type(told).__name__
        demand(isinstance(told, str), f"expected load_weights to return text, or '', got {got}")

    # --- sampling ---------------------------------------------------------------------------------

    def clips_are_of_their_seeds(self) -> str:
        try:
            self.model.check_generation([self.caption])
        except ValueError as error:
            raise Untold(f"not called, for check_generation says: {error}") from error
        texts, seeds, form = [self.caption] * 2, torch.tensor([1, 2]), self.model.clip_format
        self.model.transformer.eval()
        clips = list(self.model.generate(texts, seeds, steps=2))
        demand(len(clips) == 2, f"expected a clip for each of two captions, got {len(clips)}")
        [alone] = self.model.generate(texts[1:], seeds[1:], steps=2)
        for clip in clips:
            demand(isinstance(clip, Clip), f"expected a Clip, got {type(clip).__name__}")
            size = [round(form.seconds * form.fps), form.height, form.width, 3]
            got = list(clip.video.shape)
            demand(got == size, f"expected pictures of {size}, as clip_format has it, got {got}")
            long = clip.audio.shape[1] / clip.sample_rate
            demand(
                abs(long - form.seconds) < 0.1,
                f"expected {form.seconds:g} s of sound, as clip_format has it, got {long:.2f}",
            )
        apart = (clips[1].video.float() - alone.video.float()).abs().mean().item()
        demand(apart < 1, "expected the second clip to be a function of its own seed, got another")
        return f"clips of {list(clips[0].video.shape)} and {list(clips[0].audio.shape)}"


# --- small parts ----------------------------------------------------------------------------------


class Watched:
    """A transformer that counts how often it is called."""

    def __init__(self, transformer: nn.Module):
        self.transformer, self.calls = transformer, 0

    def __call__(self, *given, **named):
        self.calls += 1
        return self.transformer(*given, **named)


@contextlib.contextmanager
def _all_trainable(parameters: list[nn.Parameter]) -> Iterator[None]:
    asked = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter, wanted in zip(parameters, asked, strict=True):
            parameter.requires_grad_(wanted)


def quiet_clip(model: Model) -> Clip:
    """Grey pictures with some grain, and quiet noise: the ground on which an impulse shows."""
    form, source = model.clip_format, generator("contract")
    pictures, samples = round(form.seconds * form.fps), round(form.seconds * form.sample_rate)
    grain = torch.randint(-2, 3, (pictures, form.height, form.width, 3), generator=source)
    sound = 1e-3 * torch.randn(form.channels, samples, generator=source)
    return Clip((90 + grain).to(torch.uint8), form.fps, sound, form.sample_rate)


def with_impulse(clip: Clip, stream: str, seconds: float) -> Clip:
    """The clip with one bright picture, or a burst in the noise, at that time."""
    video, audio = clip.video.clone(), clip.audio.clone()
    if stream == "video":
        video[min(int(seconds * clip.fps), len(video) - 1)] = 240
    else:
        length = max(round(BURST * clip.sample_rate), 1)
        first = max(round(seconds * clip.sample_rate) - length // 2, 0)
        audio[:, first : first + length] *= 100
    return Clip(video, clip.fps, audio, clip.sample_rate)
