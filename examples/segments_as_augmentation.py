"""`replace_segments` as augmentation: a CutMix in time that keeps picture and sound together.

The same seconds of a clip's pictures and of its sound are overwritten by those of another clip of
the batch; labels, the names of the clips' folders, mix by the share that is replaced.
Run: python examples/segments_as_augmentation.py clips/
"""

import sys

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from syncdpo import ops
from syncdpo.data import find_clips, read_clip

SECONDS, FPS, SAMPLE_RATE = 2.0, 24.0, 16_000


class Clips(Dataset):
    def __init__(self, folder, size=(64, 64)):
        self.paths, unreadable = find_clips(folder)
        if unreadable or not self.paths:
            raise ValueError(f"folder: expected readable clips below {folder}, got {unreadable}")
        self.classes, self.size = sorted({path.parent.name for path in self.paths}), size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path, wanted = self.paths[index], {"seconds": SECONDS, "fps": FPS, "channels": 1}
        clip = read_clip(path, size=self.size, sample_rate=SAMPLE_RATE, **wanted)
        return clip.video, clip.audio[0], self.classes.index(path.parent.name)


class CutSegments:
    """A collate function: → video [B, T, H, W, 3], audio [B, N], label shares [B, classes]."""

    def __init__(self, classes, chance=0.5, shortest=0.25, longest=1.0):
        self.classes, self.chance, self.range = classes, chance, (shortest, longest)

    def __call__(self, batch):
        video, audio, label = default_collate(batch)
        length = torch.empty(len(label)).uniform_(*self.range)
        length *= torch.rand(len(label)) < self.chance
        start, donor_start = torch.rand(2, len(label)) * (SECONDS - length)
        donor = torch.arange(len(label)).roll(1)  # the loader has shuffled
        segments = ops.Segments(start, length, donor, donor_start)
        rates = {"video_rate": FPS, "audio_rate": float(SAMPLE_RATE)}
        video, audio = ops.replace_segments(video, audio, segments, clip=True, **rates)
        own, share = torch.nn.functional.one_hot(label, self.classes), length[:, None] / SECONDS
        return video, audio, (1 - share) * own + share * own[donor]


if __name__ == "__main__":
    clips = Clips(sys.argv[1])
    cut = CutSegments(len(clips.classes))
    for video, audio, shares in DataLoader(clips, batch_size=8, shuffle=True, collate_fn=cut):
        print(list(video.shape), list(audio.shape), shares.tolist())
