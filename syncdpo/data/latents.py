"""Latent caches: every clip is encoded once, training reads tensors.

A cache is a folder with one safetensors file per clip under `latents/` and an `index.json` that
lists them together with the identity of the model that encoded them. Each file carries its own
record (source, caption, flags) in its header, so the files alone say what is done: the index is
derived from them and may be rebuilt at any time, by any process. A cache of several clip formats
also says of each clip which bucket it is in.
"""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from syncdpo.data.buckets import (
    Bucket,
    check_buckets,
    formats_of,
    mixed_identity,
    take_format,
)
from syncdpo.data.captions import caption_of, with_trigger
from syncdpo.data.clips import ClipError, find_clips
from syncdpo.data.files import (
    canonical_json,
    digest,
    readable,
    reasons,
    remove_leftovers,
    unexpected,
    write_atomic,
)
from syncdpo.data.items import FORMAT, Item, PrepareSummary, file_name
from syncdpo.data.overlap import futures

INDEX = "index.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Of a cache's identity: what is no model's, so that no model need ask for it.
OWN = ("trigger", "pairs")
STREAMS = ("video", "audio")
LOSER = "{}_lose"  # a loser's stream beside its winner's; none where it is the winner's own
FOUND = ("flags", "bucket", "shared")  # of a record: what was known only when the clip was read


def prepare(
    model,
    clips: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    captions: Mapping[str, str] | None = None,
    sounds: Mapping[str, Path] | None = None,
    trigger: str | None = None,
    buckets: Sequence[Bucket] = (),
    strict: bool = False,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> PrepareSummary:
    """Encodes clips by `model.encode(clip, caption)` into the cache `out`.

    clips: a folder, or files; a clip is known by its path relative to their common folder.
    captions: {relative path: caption} (see `read_captions`); None where the model needs none.
    sounds: {relative path: file} of clips whose sound is in another file (see `read_clip`).
    trigger: a word put before every caption.
    buckets: clip formats instead of the model's own; each clip goes into the one that fits it best
        (see `syncdpo.data.buckets`), and is skipped where all are longer than it.
    strict: leaves out clips that `winner_flags` finds fault with; else they are only reported.
    shard: (rank, world): this process takes every world-th clip; all name the same `out`.

    A file appears under its name only when it is whole, and what is there and whole is not done
    again: a run that was killed at any point is resumed by the same call, and ends with the same
    bytes. Unusable clips are skipped with their reason. Raises ValueError where `out` belongs to
    another model, other buckets or another trigger, or has a name that is not UTF-8, a bucket is
    none of the model's, or no clip can be used, OSError (ENOSPC) where the disk is full.
    """
    return prepare_items(
        model,
        lambda: _list_items(clips, captions, sounds or {}, Path(out)),
        out,
        captioned=captions is not None,
        own={} if trigger is None else {"trigger": trigger},
        buckets=buckets,
        strict=strict,
        shard=shard,
        progress=progress,
    )


def prepare_items(
    model,
    listed: Callable[[], tuple[Sequence[Item], list[tuple[Path, str]]]],
    out: str | Path,
    *,
    captioned: bool,
    own: dict,
    buckets: Sequence[Bucket] = (),
    strict: bool = False,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
    unit: str = "clips",
) -> PrepareSummary:
    """What `prepare` does, of items of any kind, all of this cache.

    listed: gives all items, and what cannot be read with reasons; asked once the model has told
    its identity, so that what it lacks is said before anything is looked for. captioned: whether
    there are captions to look into.
    own: what the cache's identity says beside the model's (see `OWN`). unit: what items are called.
    """
    rank, world = _check_shard(shard)
    out = Path(out)
    if bytes(out) != str(out).encode("utf-8", "replace"):  # safetensors finds no file there
        raise ValueError(f"out: expected a folder with a name in UTF-8, got {readable(out)}")
    formats, identity = _formats(model, buckets)
    identity |= own
    items, left = listed()
    _claim(out, identity)

    summary = PrepareSummary(
        skipped=left if rank == 0 else [], no_captions=not captioned, unit=unit
    )
    if len(formats) > 1:
        summary.buckets |= Counter(dict.fromkeys(formats, 0))
    mine = items[rank::world]
    if captioned:
        summary.without_caption = [item.path for item in mine if item.caption is None]
        summary.empty_caption = [item.path for item in mine if item.caption == ""]
    try:
        pending = [item for item in mine if not _keep(item, identity, strict, summary)]
        with tqdm(
            total=len(mine),
            initial=len(mine) - len(pending),
            disable=not progress,
            desc="prepare",
            unit=unit.removesuffix("s"),
        ) as bar:
            # While the model encodes, a thread decodes the next ones.
            decoded = futures(lambda item: item.decode(formats), pending, threads=1, ahead=2)
            for item, clip in zip(pending, decoded, strict=True):
                _encode(model, item, clip, identity, strict, summary)
                bar.update()
        _write_index(out, identity, items, strict)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise OSError(
            error.errno,
            f"the disk is full after {summary.usable} of {len(mine)} {unit}; "
            "free some space and run the same command again, it goes on from there",
            str(out),
        ) from error
    if mine and not summary.usable:
        raise ValueError(f"{unit}: none of {len(mine)} can be used\n{summary}")
    return summary


class LatentDataset(Dataset):
    """The cache `folder` as a dataset: item i is {name: tensor} as `model.encode` returned it.

    Clips are ordered by their source's name, whoever prepared them and in whichever order.
    `buckets` has the bucket of each, None where the cache has one clip format.
    `pairs`: whether it holds pairs (see `syncdpo.data.pairs`). "video" and "audio" are then the
    winner's, "video_lose" and "audio_lose" the loser's; a stream that winner and loser share in
    every pair has none. Where `losers` is set to false, items are the winners alone.
    `identity`: `model.identity()`, or `mixed_identity(model, buckets)`; a cache of another VAE,
    text encoder or clip format raises ValueError naming what differs, and one with files that are
    missing, damaged or of another model names them: headers are read at once. Tensors are read
    from safetensors; nothing is unpickled.
    """

    def __init__(self, folder: str | Path, identity: dict | None = None):
        self.folder = Path(folder)
        index = _read_index(self.folder)
        if index is None:
            raise ValueError(
                f"folder: expected a latent cache with an {INDEX}, got {self.folder}; "
                "make one with `syncdpo prepare`"
            )
        if identity is not None:
            own = {name: index["identity"][name] for name in OWN if name in index["identity"]}
            _check_identity(self.folder, index["identity"], identity | own)
        self.identity: dict = index["identity"]
        self.clips: list[dict] = index["clips"]
        self.pairs: bool = self.identity.get("pairs", False)
        self.losers = self.pairs
        self.buckets = [
            Bucket(*clip["bucket"]) if "bucket" in clip else None for clip in self.clips
        ]
        if not self.clips:
            raise ValueError(
                f"folder: {self.folder} lists no {'pairs' if self.pairs else 'clips'}; "
                f"`{self._command}` has not finished there"
            )
        self.shared = [
            s for s in STREAMS if all(s in clip.get("shared", ()) for clip in self.clips)
        ]
        self._check_files()

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def names(self) -> list[str]:
        """What each clip is called: its source's path; a pair is called as its winner, so that all
        of one winner go the same way where clips are chosen by their names."""
        return [clip.get("win", clip["source"]) for clip in self.clips]

    @property
    def _command(self) -> str:
        return "syncdpo prepare-pairs" if self.pairs else "syncdpo prepare"

    def _check_files(self) -> None:
        """Whether each file is as long as its header says, of this cache's model and its bucket."""
        ours = digest(self.identity)
        names = [clip["file"] for clip in self.clips]
        records = (_stored_record(self.folder / "latents" / name) for name in names)
        broken = [
            clip["file"]
            for clip, record in zip(self.clips, records, strict=True)
            if record is None
            or record["identity"] != ours
            or record.get("bucket") != clip.get("bucket")
        ]
        if broken:
            raise ValueError(
                f"{self.folder}: {len(broken)} of {len(names)} files are missing, damaged or of "
                f"another model ({', '.join(broken)}); run `{self._command}` again"
            )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path = self.folder / "latents" / self.clips[index]["file"]
        try:
            sample = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} is missing or damaged ({error}); run `{self._command}` again"
            ) from error
        if not self.pairs:
            return sample
        for stream in STREAMS:
            loser = sample.pop(LOSER.format(stream), sample[stream])
            # Batches are of items with one set of names.
            if self.losers and stream not in self.shared:
                sample[LOSER.format(stream)] = loser
        return sample


# --- one clip -------------------------------------------------------------------------------------


def _keep(item: Item, identity: dict, strict: bool, summary: PrepareSummary) -> bool:
    """Whether the clip's latents are there and whole, from this very source and model."""
    found = _stored_record(item.target)
    if found is None or not item.is_there():
        return False
    flags, bucket, _ = (found.pop(name, None) for name in FOUND)
    if found != item.record(digest(identity)):
        return False
    if not _report(item, flags, strict, summary):
        summary.kept += 1
        if bucket is not None:
            summary.buckets[Bucket(*bucket)] += 1
    return True


def _encode(
    model, item: Item, clip: Future, identity: dict, strict: bool, summary: PrepareSummary
) -> None:
    try:
        bucket, decoded = clip.result()
        flags = item.flags(decoded)
    except ClipError as error:
        summary.skipped.append((item.path, error.reason))
        return
    except Exception as error:  # one odd file ends no run over thousands
        summary.skipped.append((item.path, unexpected(error)))
        return
    if _report(item, flags, strict, summary):
        return
    take_format(model, bucket)
    caption = with_trigger(identity.get("trigger"), item.caption or "")
    tensors = item.encode(model, decoded, caption)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    broken = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        summary.skipped.append((item.path, f"its {', '.join(broken)} came out NaN or infinite"))
        return
    record = item.record(digest(identity)) | {"flags": flags} | item.found(decoded)
    if bucket is not None:
        record["bucket"] = list(bucket)
        summary.buckets[bucket] += 1
    # One metadata key only: the header's order, so the file's bytes, never depend on hashing.
    write_atomic(item.target, save(tensors, metadata={"syncdpo": canonical_json(record)}))
    summary.noted += [(item.path, note) for note in item.notes(decoded)]
    summary.made += 1


def _report(item: Item, flags: list[str], strict: bool, summary: PrepareSummary) -> bool:
    """Notes the winner's faults; True where they leave the clip out."""
    if flags:
        (summary.skipped if strict else summary.flagged).append((item.path, "; ".join(flags)))
    return bool(flags) and strict


def _formats(model, buckets: Sequence[Bucket]) -> tuple[dict, dict]:
    """What is wanted of a clip in each bucket, and the identity of such a cache.

    One bucket is nothing but the model's clip format, and stands under None.
    """
    if buckets:
        check_buckets(model, buckets)
    if len(buckets) > 1:
        return formats_of(model, buckets), mixed_identity(model, buckets)
    for bucket in buckets:
        take_format(model, bucket)
    return {None: model.clip_format}, model.identity()


# --- the folder -----------------------------------------------------------------------------------


def _list_items(
    clips, captions: Mapping[str, str] | None, sounds: Mapping[str, Path], out: Path
) -> tuple[list[Item], list[tuple[Path, str]]]:
    """The clips, and what cannot be read, with reasons."""
    left = []
    if isinstance(clips, (str, Path)):
        root = Path(clips)
        if not root.is_dir():
            raise ValueError(f"clips: expected a folder of clips, got {root}")
        paths, left = find_clips(root)
    else:
        paths = sorted(Path(path) for path in clips)
        root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    if not paths:
        raise ValueError("\n".join([f"clips: no clips found in {clips}", *reasons(left)]))
    items = []
    for path in paths:
        source = path.relative_to(root).as_posix()
        caption = caption_of(source, captions) if captions is not None else None
        sound = sounds.get(source)
        source = readable(source)  # a name that is not UTF-8 stands in no index
        items.append(Item(path, source, caption, out / "latents" / file_name(source), sound))
    return sorted(items, key=lambda item: item.source), left


def _claim(out: Path, identity: dict) -> None:
    """Makes the cache's folder the model's own, or refuses another model's."""
    (out / "latents").mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    remove_leftovers(out / "latents")
    index = _read_index(out)
    if index is not None:
        _check_identity(out, index["identity"], identity)
    else:
        content = {"format": FORMAT, "identity": identity, "clips": []}
        write_atomic(out / INDEX, canonical_json(content).encode())


def _write_index(out: Path, identity: dict, items: Sequence[Item], strict: bool) -> None:
    """Lists the finished files of all processes.

    Lock-free: whoever writes looks again afterwards, and writes again where a file has come in
    between. So the last index written lists every file that was finished before it, and a process
    that finishes a file later writes an index later.
    """
    ours, written = digest(identity), None
    while True:
        records = [_stored_record(item.target) for item in items]
        shown = ("source", "caption", "win", "lose", "sound", *FOUND)
        listed = [
            {"file": item.target.name, **{key: r[key] for key in shown if key in r}}
            for item, r in zip(items, records, strict=True)
            if r is not None and r["identity"] == ours and not (strict and r["flags"])
        ]
        if listed == written:
            return
        content = {"format": FORMAT, "identity": identity, "clips": listed}
        write_atomic(out / INDEX, canonical_json(content, indent=1).encode())
        written = listed


def _read_index(folder: Path) -> dict | None:
    try:
        text = (folder / INDEX).read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        index = json.loads(text)
        found = index["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / INDEX} is not the index of a latent cache") from error
    if found != FORMAT:
        raise ValueError(f"{folder}: expected a cache of format {FORMAT}, got {found}")
    return index


def _check_identity(folder: Path, cached: dict, model: dict) -> None:
    """Compares as JSON does: a tuple and a list, an int and a float of one value are the same."""
    cached, model = (json.loads(canonical_json(identity)) for identity in (cached, model))
    different = [
        f"{key} is {cached.get(key, 'not recorded')} in the cache, {model.get(key, 'none')} here"
        for key in sorted(cached.keys() | model.keys())
        if cached.get(key) != model.get(key)
    ]
    if different:
        raise ValueError(
            f"{folder} was prepared with another model or other settings: "
            f"{'; '.join(different)}. "
            "Prepare the clips into another folder."
        )


def _stored_record(path: Path) -> dict | None:
    """The record in a latent file's header; None where there is no whole file of this format."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("syncdpo", "null"))
    except (FileNotFoundError, SafetensorError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None


def _check_shard(shard: tuple[int, int]) -> tuple[int, int]:
    rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"shard: expected (rank, world) with 0 <= rank < world, got {shard}")
    return rank, world
