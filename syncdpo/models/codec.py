"""A fixed, training-free codec between 2 s clips and small latents.

Nothing is learnt, so nothing is shipped, and whatever a generator gets wrong is its own doing.

Pictures become cell averages (luma 8×8, chroma 4×4), two pictures and one quadrant to a token.
Sound becomes band levels, as in a channel vocoder: 16 bands from 200 Hz to 6 kHz, every 20 ms, two
such steps to a token; synthesis lets one sine per band follow its level.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FPS, SIZE, SAMPLE_RATE = 24, 64, 16_000
PICTURES = 2  # per video latent
CELLS, CHROMA_CELLS = 8, 4  # per picture side
VIDEO_TOKENS, VIDEO_CHANNELS = 4, 40
BANDS, STEPS = 16, 2  # per audio latent
AUDIO_RATE, AUDIO_CHANNELS = 25, BANDS * STEPS
HOP = SAMPLE_RATE // (AUDIO_RATE * STEPS)
WINDOW = 2 * HOP
LEVEL_FLOOR = 0.01  # amplitude; quieter is silence
# Mean and spread per kind of channel over rendered clips, so that latents are about N(0, 1).
LUMA, CHROMA, LEVEL = (0.14, 0.14), (0.0, 0.06), (-4.4, 0.6)

# Rec. 601 luma and colour differences, full range.
_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])


def band_centres() -> Tensor:
    """Centre frequencies in Hz, evenly spaced in log frequency."""
    return 200.0 * 30.0 ** (torch.arange(BANDS) / (BANDS - 1))


def encode_video(video: Tensor) -> Tensor:
    """uint8 [T,64,64,3] → [T/2 · 4, 40]: per latent frame the four quadrants' tokens."""
    ycc = (video.float() / 255) @ _YCC.T
    luma = F.avg_pool2d(ycc[..., 0][:, None], SIZE // CELLS)
    chroma = F.avg_pool2d(ycc[..., 1:].permute(0, 3, 1, 2), SIZE // CHROMA_CELLS)
    chroma = chroma.unflatten(0, (-1, PICTURES)).mean(1)
    luma = luma[:, 0].unflatten(0, (-1, PICTURES))
    luma, chroma = (luma - LUMA[0]) / LUMA[1], (chroma - CHROMA[0]) / CHROMA[1]
    return torch.cat([_quadrants(luma), _quadrants(chroma)], dim=-1).flatten(0, 1)


def decode_video(latents: Tensor) -> Tensor:
    """[F·4, 40] → uint8 [2F,64,64,3]; cells are interpolated bicubically."""
    tokens = latents.float().unflatten(0, (-1, VIDEO_TOKENS))
    luma_channels = PICTURES * CELLS**2 // VIDEO_TOKENS
    luma = _from_quadrants(tokens[..., :luma_channels], PICTURES) * LUMA[1] + LUMA[0]
    chroma = _from_quadrants(tokens[..., luma_channels:], 2) * CHROMA[1] + CHROMA[0]
    luma = F.interpolate(luma.flatten(0, 1)[:, None], (SIZE, SIZE), mode="bicubic")
    chroma = F.interpolate(chroma, (SIZE, SIZE), mode="bicubic").repeat_interleave(PICTURES, 0)
    rgb = torch.cat([luma, chroma], 1).permute(0, 2, 3, 1) @ torch.linalg.inv(_YCC).T
    return (rgb.clamp(0, 1) * 255).round().to(torch.uint8)


def encode_audio(audio: Tensor) -> Tensor:
    """float [N] at 16 kHz → [N/640, 32]: log band levels, two steps of 16 bands to a latent."""
    pad = (WINDOW - HOP) // 2
    frames = F.pad(audio.float(), (pad, pad)).unfold(0, WINDOW, HOP)
    window = torch.hann_window(WINDOW)
    spectrum = torch.fft.rfft(frames * window, n=2048).abs().square()
    power = spectrum @ _filterbank() * 4 / (2048 * window.square().sum())  # Parseval: amplitude²
    level = (power.sqrt() + LEVEL_FLOOR).log()
    return ((level - LEVEL[0]) / LEVEL[1]).unflatten(0, (-1, STEPS)).flatten(1)


def decode_audio(latents: Tensor) -> Tensor:
    """[L, 32] → float [640·L] in [-1, 1]: one sine per band, its level interpolated linearly."""
    level = latents.float().unflatten(1, (STEPS, BANDS)).flatten(0, 1) * LEVEL[1] + LEVEL[0]
    level = (level.exp() - LEVEL_FLOOR).clamp(0, 1)
    level = F.interpolate(level.T[None], scale_factor=HOP, mode="linear")[0]
    t = torch.arange(level.shape[1], dtype=torch.float64) / SAMPLE_RATE
    sines = torch.sin(2 * torch.pi * band_centres().double()[:, None] * t).float()
    return (level * sines).sum(0).clamp(-1, 1)


def _quadrants(x: Tensor) -> Tensor:
    """[F, P, n, n] → [F, 4, P·n²/4]: a token per quadrant, row by row."""
    x = x.unflatten(3, (2, -1)).unflatten(2, (2, -1))  # F P 2 n/2 2 n/2
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _from_quadrants(tokens: Tensor, planes: int) -> Tensor:
    """The inverse of `_quadrants`."""
    half = round((tokens.shape[-1] // planes) ** 0.5)
    x = tokens.unflatten(2, (planes, half, half)).unflatten(1, (2, 2))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _filterbank() -> Tensor:
    """Triangles in log frequency that sum to one between neighbours: [bins, bands]."""
    frequency = torch.arange(1025) * SAMPLE_RATE / 2048
    step = torch.log(band_centres()[1] / band_centres()[0])
    position = (frequency.clamp(min=1)[:, None] / band_centres()).log() / step
    return (1 - position.abs()).clamp(min=0)
