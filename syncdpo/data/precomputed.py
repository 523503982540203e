"""Folders of latents that the LTX-2 trainer prepared, read as they are, and any cache by one name.

The trainer writes `.precomputed/{latents,audio_latents,conditions}`, one .pt file per clip and the
same relative name in each. Latents are normalised already; text is cached as the connectors'
input, so the connectors run in `LTX2.velocity`. Old files differ: latents packed to [S,C], one
`prompt_embeds` for both streams, `condition_x.pt` beside `latent_x.pt`, padding trimmed off.

Every file is read and checked once, when the folder is opened, and a clip that is not whole is left
out by name: found in the middle of a training it would end it, and picture and sound of different
lengths would never be found, only learnt.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from syncdpo.data.buckets import Bucket, mixed_identity, recorded_buckets, take_format
from syncdpo.data.files import reasons
from syncdpo.data.foreign_tensors import Unusable, load_tensors
from syncdpo.data.latents import INDEX, LatentDataset
from syncdpo.data.trainer_clip import (
    ClipShape,
    Layout,
    mistimed,
    packed_audio,
    packed_text,
    packed_video,
    size_text,
)

FOLDER = ".precomputed"
ONE_RATE = 1e-3  # by which rates may differ that are one: the trainer stores each clip's average
SLOW = 3.0  # seconds of checking before it shows how far it is


def open_latents(folder: str | Path, model, *, progress: bool = False) -> Dataset:
    """The latents in `folder` as a dataset for `model`: a cache of ours, or the LTX-2 trainer's.

    A model with `set_format` takes on the clip format of the data; where there are several, the
    dataset's `buckets` has that of each clip, and the model is left in the commonest. Raises
    ValueError where there are no latents, or latents that do not fit the model.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        data: Dataset = _open_cache(folder, model)
    elif is_precomputed(folder):
        data = PrecomputedDataset(folder, model, progress=progress)
    else:
        raise ValueError(
            f"data: expected a cache made by `syncdpo prepare` or a {FOLDER} folder of the LTX-2 "
            f"trainer, got {folder}"
        )
    if hasattr(model, "check_latents"):
        for bucket, _ in reversed(Counter(data.buckets).most_common()):
            take_format(model, bucket)
            model.check_latents(data[data.buckets.index(bucket)])
    return data


def _open_cache(folder: Path, model) -> LatentDataset:
    """A cache of ours, made by the encoders of `model`."""
    clip = LatentDataset(folder).identity
    if hasattr(model, "text_encoder_precision"):
        # Training needs no text encoder, so whatever precision the cache's had will do.
        model.text_encoder_precision = clip.get("text_encoder_precision", "bf16")
    buckets = recorded_buckets(clip)
    if buckets and hasattr(model, "set_format"):
        return LatentDataset(folder, mixed_identity(model, buckets))
    frames = round(clip.get("seconds", 0) * clip.get("fps", 0))
    if hasattr(model, "set_format") and frames and {"height", "width"} <= clip.keys():
        model.set_format(frames, clip["height"], clip["width"], clip["fps"])
    return LatentDataset(folder, model.identity())


def is_precomputed(folder: str | Path) -> bool:
    """Whether `folder` is, or holds, what the LTX-2 trainer prepared."""
    return any((root / "latents").is_dir() for root in (Path(folder) / FOLDER, Path(folder)))


class PrecomputedDataset(Dataset):
    """The clips of a `.precomputed` folder that are whole, of as many formats as there are.

    folder: the folder, or the one that holds it. model: an `LTX2`; takes on the commonest format.
    A format is a size in latents, and the median of frame rates that are within a thousandth of
    each other; `buckets` has that of each clip.

    Item i: "video" [S,C] and "audio" [L,C], packed; "video_features", "audio_features" [1024,D] and
    "text_mask" bool [1024], padded on the left. `skipped` holds the clips left out, with reasons,
    and `summary` says them. Raises ValueError where no clip can be used, for another model than
    LTX-2, and for a file that holds anything but tensors, numbers and their containers.
    """

    def __init__(self, folder: str | Path, model, *, progress: bool = False):
        root = Path(folder)
        self.root = root / FOLDER if (root / FOLDER).is_dir() else root
        self.skipped: list[tuple[Path, str]] = []
        paths = _files(self.root / "latents")
        if not paths:
            raise ValueError(f"data: expected .pt files in {self.root / 'latents'}, got none")
        self._layout = Layout.of(model, self.root)
        found: dict[Path, ClipShape] = {}
        for path in tqdm(paths, "check", unit="clip", delay=SLOW, disable=not progress):
            try:
                found[path] = self._read(path)[1]
            except Unusable as error:
                self.skipped.append((path, str(error)))
        # What each clip must still be when it is read again: size in latents, audio latents.
        self._expected: dict[Path, tuple[tuple[int, int, int], int]] = {}
        chosen = self._choose(found, model)
        self.clips = sorted(chosen)
        self.buckets = [chosen[path] for path in self.clips]
        self.skipped.sort()
        self.summary = self._summary(paths)
        if not self.clips:
            raise ValueError(f"data: none of {self.summary}")
        self._dtypes = {
            name: reduce(torch.promote_types, (found[path].dtypes[name] for path in self.clips))
            for name in found[self.clips[0]].dtypes
        }

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path = self.clips[index]
        try:
            sample, clip = self._read(path)
        except Unusable as error:
            raise ValueError(f"{path}: {error}; it has changed since it was checked") from error
        size, audio_frames = self._expected[path]
        if clip.size != size or clip.fault or clip.audio < audio_frames:
            raise ValueError(f"{path} has changed since it was checked")
        sample["audio"] = sample["audio"][:audio_frames]
        return {name: x.to(self._dtypes[name]).contiguous() for name, x in sample.items()}

    @property
    def names(self) -> list[str]:
        """What each clip is called: its latents' path."""
        return [path.relative_to(self.root / "latents").as_posix() for path in self.clips]

    # --- opening ----------------------------------------------------------------------------------

    def _choose(self, found: dict[Path, ClipShape], model) -> dict[Path, Bucket]:
        """The clips that can be used and their formats; the model takes on the commonest."""
        self.skipped += [(path, clip.fault) for path, clip in found.items() if clip.fault]
        whole = {path: clip for path, clip in found.items() if not clip.fault}
        chosen: dict[Path, Bucket] = {}
        for paths, rate in _formats(whole):
            size = whole[paths[0]].size
            if size[0] == 1:
                self.skipped += [
                    (path, "it is a still, with no time to be in step") for path in paths
                ]
                continue
            bucket = self._layout.bucket(size, rate)
            take_format(model, bucket)
            audio_frames = model.timelines[1].frames
            for path in paths:
                if whole[path].audio < audio_frames:  # by the common rate, not its own
                    reason = f"expected {audio_frames} audio latents, got {whole[path].audio}"
                    self.skipped.append((path, reason))
                    continue
                chosen[path], self._expected[path] = bucket, (size, audio_frames)
        if chosen:
            take_format(model, Counter(chosen.values()).most_common(1)[0][0])
        return chosen

    def _summary(self, paths: list[Path]) -> str:
        """How many clips are used, why the others are not, and files that belong to no clip."""
        lines = [f"{len(self.clips)} of {len(paths)} clips in {self.root} used"]
        if not self.clips:
            lines = [f"{len(paths)} clips in {self.root} can be used with {self._layout.model}"]
        if len(counts := Counter(self.buckets)) > 1:
            lines += [
                f"  {count} of {size_text(self._layout.size(bucket))} latents at {bucket.fps:g} fps"
                for bucket, count in counts.most_common()
            ]
        latents = self.root / "latents"
        lines += reasons([(path.relative_to(latents), why) for path, why in self.skipped])
        for kind, beside in (("audio_latents", self._audio), ("conditions", self._conditions)):
            known = {beside(path) for path in paths}
            folder = self.root / kind
            alone = [p.relative_to(self.root) for p in _files(folder) if p not in known]
            lines += reasons([(path, "no latents beside") for path in alone])
        return "\n".join(lines)

    # --- one clip ---------------------------------------------------------------------------------

    def _read(self, path: Path) -> tuple[dict[str, Tensor], ClipShape]:
        """The sample and its format. Raises Unusable with what is wrong."""
        files = path, self._audio(path), self._conditions(path)
        for beside in files[1:]:
            if not beside.is_file():
                raise Unusable(f"it lacks {beside.relative_to(self.root).as_posix()}")
        seen, heard, text = (load_tensors(file, self.root) for file in files)
        video, size, rate = packed_video(seen, self._layout)
        audio = packed_audio(heard, self._layout)
        pictures = self._layout.pictures(size[0])
        fault = mistimed(heard, len(audio), pictures, rate, self._layout)
        sample = {"video": video, "audio": audio} | packed_text(text, self._layout)
        dtypes = {name: tensor.dtype for name, tensor in sample.items()}
        return sample, ClipShape(size, rate, len(audio), dtypes, fault)

    def _audio(self, latents: Path) -> Path:
        return self.root / "audio_latents" / latents.relative_to(self.root / "latents")

    def _conditions(self, latents: Path) -> Path:
        path = self.root / "conditions" / latents.relative_to(self.root / "latents")
        if path.name.startswith("latent_"):
            return path.with_name("condition_" + path.name.removeprefix("latent_"))
        return path


# --- many clips -----------------------------------------------------------------------------------


def _formats(found: dict[Path, ClipShape]) -> Iterator[tuple[list[Path], float]]:
    """The clips of each size whose rates are one, in order, and their median rate."""
    sizes = defaultdict(list)
    for path, clip in found.items():
        sizes[clip.size].append((clip.rate, path))
    for clips in sizes.values():
        clips.sort()
        while clips:
            first, last = _commonest([rate for rate, _ in clips])
            alike = clips[first:last]
            rate = alike[(len(alike) - 1) // 2][0]
            yield sorted(path for _, path in alike), round(rate, 3)
            del clips[first:last]


def _commonest(rates: list[float]) -> tuple[int, int]:
    """The longest stretch of rates, which rise, that are one."""
    best, start = (0, 0), 0
    for end, rate in enumerate(rates, start=1):
        while rate > rates[start] * (1 + ONE_RATE):
            start += 1
        if end - start > best[1] - best[0]:
            best = start, end
    return best


def _files(folder: Path) -> list[Path]:
    """All .pt files below, also those in linked folders; none where there is no such folder."""
    found, seen = [], set()
    if not folder.exists():
        return found

    def stop(error: OSError):
        raise error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        real = os.path.realpath(place)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        found += [Path(place) / name for name in names if name.endswith(".pt")]
    return sorted(found)
