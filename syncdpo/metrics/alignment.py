"""AV-Align: do onsets of the sound and peaks of the optical flow fall on the same pictures?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from syncdpo.metrics.timing import Clip


def av_align(clip: Clip) -> float:
    """AV-Align (Yariv et al., "Diverse and Aligned Audio-to-Video Generation via Text-to-Video
    Model Adaptation", arXiv 2309.16429), as JavisBench computes it:

        hits / (A + V − hits), a hit: |Δ| < one frame, each visible peak at most once

    A: librosa's onsets at 22.05 kHz. V: local maxima, of 0.1 px at least, of the mean magnitude of
    Farneback's optical flow. 0 where nothing happens in either. Needs the extra `eval` (librosa,
    OpenCV); ImportError without it.
    """
    flow = Flow()
    means = [flow(picture) for picture in clip.video]
    times = np.arange(len(means)) / clip.fps
    return flow_align(means, times, 1 / clip.fps, clip.audio, clip.sample_rate)


def flow_align(
    flow: Sequence[float], times: np.ndarray, frame: float, audio: Tensor, sample_rate: int
) -> float:
    """`av_align` of pictures that come on at `times`; flow: `Flow` of each. frame: seconds."""
    import librosa

    sound = audio.mean(0).cpu().numpy()
    sound = librosa.resample(sound, orig_sr=sample_rate, target_sr=22_050)
    heard = librosa.onset.onset_detect(y=sound, sr=22_050, units="time")
    flow = np.array([*flow[1:2], *flow[1:]])  # into the first picture, as into the second
    middle = flow[1:-1]
    peak = (middle > flow[:-2]) & (middle > flow[2:]) & (middle >= 0.1)
    seen = times[np.nonzero(peak)[0] + 1]
    hits, free = 0, np.ones(len(seen), dtype=bool)
    for time in heard:
        near = np.nonzero(free & (np.abs(seen - time) < frame))[0]
        if len(near):
            hits += 1
            free[near[0]] = False
    union = len(heard) + len(seen) - hits
    return hits / union if union else 0.0


class Flow:
    """Pictures one after the other → mean magnitude of the flow into each, in pixels; the first's
    is 0. Only the last picture's grey is held.
    """

    def __init__(self):
        self.before: np.ndarray | None = None

    def __call__(self, picture: Tensor) -> float:
        import cv2

        grey = cv2.cvtColor(picture.cpu().numpy(), cv2.COLOR_RGB2GRAY)
        before, self.before = self.before, grey
        if before is None:
            return 0.0
        flow = cv2.calcOpticalFlowFarneback(before, grey, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        return float(np.hypot(flow[..., 0], flow[..., 1]).mean())
