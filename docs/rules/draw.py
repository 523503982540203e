"""Draw what each rule does to one rendered clip: python docs/rules/draw.py

For each rule a picture of three spectrograms (the clip, a coarse and a subtle loser) and, below,
which source time each of them plays.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from syncdpo.data.synthetic import SAMPLE_RATE, SECONDS, draw_balls, render_audio
from syncdpo.negatives import Timeline, parse_rule
from syncdpo.negatives.distortion import RULES

CLIP, SEED = 3, 2
TIMELINE = Timeline(round(SECONDS * SAMPLE_RATE), float(SAMPLE_RATE))


def spectrogram(wave: torch.Tensor) -> torch.Tensor:
    """Decibels below full scale, [frequency, time]; 64 Hz and 8 ms to a cell."""
    window = torch.hann_window(512)
    spectrum = torch.stft(wave, 512, 128, window=window, return_complex=True).abs()
    return 20 * (spectrum / window.sum() * 2 + 1e-5).log10()


def draw(rule: str, folder: Path) -> None:
    sound = render_audio(draw_balls(CLIP)[0])
    clock = torch.arange(len(sound)) / SAMPLE_RATE
    figure, axes = plt.subplots(2, 3, figsize=(8, 3.2), sharex=True, height_ratios=(3, 1))
    for column, difficulty in enumerate((None, 0.0, 1.0)):
        heard, played, title = sound, clock, "clip"
        if difficulty is not None:
            generator = torch.Generator().manual_seed(SEED)
            distortion = parse_rule(rule).draw(1, difficulty, SECONDS, generator=generator)
            heard, played = (distortion.apply(x[None], TIMELINE)[0] for x in (sound, clock))
            title = f"{rule}, d = {difficulty:g}: {distortion.strength.item():.2f} s"
        axes[0, column].set_title(title, fontsize=9)
        extent = (0, SECONDS, 0, SAMPLE_RATE / 2000)
        axes[0, column].imshow(
            spectrogram(heard), origin="lower", aspect="auto", extent=extent, vmin=-80, vmax=0
        )
        axes[1, column].plot(clock, clock, color="0.8", linewidth=1)
        axes[1, column].plot(clock[::40], played[::40], ".", markersize=1)
        axes[1, column].set_xlabel("s", fontsize=8)
    axes[0, 0].set_ylabel("kHz", fontsize=8)
    axes[1, 0].set_ylabel("plays s", fontsize=8)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
    figure.tight_layout(pad=0.5)
    figure.savefig(folder / f"{rule}.png", dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    for name in RULES:
        draw(name, Path(__file__).parent)
