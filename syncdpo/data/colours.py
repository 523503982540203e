"""Decoded pictures as RGB: by the colours that their tags name, upright, scaled and cropped."""

from fractions import Fraction

import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from torch import Tensor

from syncdpo.data.container import Refused

# swscale's exact paths: without them the mean colour drifts by 1 to 2 of 255.
EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP

_BT2020 = 9  # AVCOL_SPC_BT2020_NCL
# Matrices that swscale knows, and the nearest of those that it does not; by AVCOL_SPC's numbers.
_KNOWN_MATRICES = {0, 1, 4, 5, 6, 7, 9}
_UNREADABLE_MATRICES = {8: "YCgCo", 11: "SMPTE 2085", 14: "ICtCp", 16: "YCgCo-R", 17: "YCgCo-R"}
_CONSTANT_LUMINANCE = 10
_BY_PRIMARIES = {12, 13}


class ToRGB:
    """Frame → uint8 [H,W,3]: colours by the frame's tags, then upright, scaled and cropped."""

    def __init__(self, size: tuple[int, int] | None, pixel_aspect: Fraction | None):
        self.size = size
        self.pixel_width = float(pixel_aspect or 1)
        self.reformatter = VideoReformatter()

    def __call__(self, frame) -> Tensor:
        turns = turns_of(frame)
        height, width = frame.height, round(frame.width * self.pixel_width)
        if self.size is not None:
            target = self.size if turns % 2 == 0 else self.size[::-1]
            ratio = max(target[0] / height, target[1] / width)
            height, width = round(height * ratio), round(width * ratio)
        picture = self.reformatter.reformat(
            frame, width=width, height=height, format="rgb24",
            src_colorspace=_matrix(frame), src_color_range=_range(frame),
            dst_color_range=ColorRange.JPEG, interpolation=Interpolation.BICUBIC | EXACT,
        )  # fmt: skip
        picture = torch.from_numpy(np.rot90(picture.to_ndarray(), turns).copy())
        if self.size is None:  # a stream may change its size: the first picture's counts
            self.size = tuple(picture.shape[:2])
        return _centre(picture, self.size)


def turns_of(frame) -> int:
    """Counter-clockwise quarters that put a picture upright."""
    return round(frame.rotation / 90) % 4


def _matrix(frame) -> int:
    """The frame's matrix, or the nearest that swscale knows; untagged pictures are Rec. 709 from
    720 lines on and Rec. 601 below, as players assume."""
    matrix = int(frame.colorspace)
    if matrix in _UNREADABLE_MATRICES:
        raise Refused(f"its colours are {_UNREADABLE_MATRICES[matrix]}, which cannot be read")
    if matrix in _BY_PRIMARIES:  # the primaries' own coefficients: Rec. 709 is 1 in both lists
        matrix = int(frame.color_primaries)
    if matrix == _CONSTANT_LUMINANCE:
        return _BT2020
    if matrix in _KNOWN_MATRICES:
        return matrix
    return Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601


def _range(frame) -> int:
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return ColorRange.JPEG if full or frame.format.is_rgb else ColorRange.MPEG


def _centre(picture: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = ((have - want) // 2 for have, want in zip(picture.shape, size, strict=False))
    return picture[top : top + size[0], left : left + size[1]].contiguous()
