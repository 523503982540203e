"""Families of rendered clips: four to train on, and one out of their distribution.

Each clip is a function of its family and seed: 48 pictures of 64×64 at 24 fps, 2 s of sound at
16 kHz, the true times of what happens, and a stem per source. In all of them what is seen fixes
*what* is heard (a colour has a pitch) and *when*, as for the balls of `synthetic`; they differ in
how often, how plainly, by how many sources. `syncdpo render FAMILY FOLDER` writes them as mp4;
docs/families.md has what the detectors find in each.
"""

import torch
from torch import Tensor

from syncdpo.data.scenes import (
    BANDS,
    Uniform,
    box,
    choice,
    colour_of,
    draw_times,
    ellipse,
    frames,
    grid,
    hiss,
    inside,
    painted,
    partials,
    per_picture,
    picture_times,
    rendered,
    sound_times,
    struck,
    uniform_of,
)
from syncdpo.data.synthetic import MARGIN, SECONDS, SIZE, Family, Rendered, around, render

# --- speech ---------------------------------------------------------------------------------------

SYLLABLE_GAP = (1 / 6, 1 / 3)  # s
# Without pauses any sound of that rhythm would seem in step: F1 0.89 with another clip's.
PAUSE, PAUSES = (0.3, 0.55), 0.35  # s more after a word; share of syllables that end one
UNVOICED = 0.3  # share of syllables
VOICES = BANDS[:6]  # Hz, one to a colour of the face: a deep voice is below the codec's bands
VOICE = {1: 0.35, 2: 0.18, 3: 0.1, 4: 0.05}  # partials' amplitudes
HISS = 0.2  # amplitude of unvoiced sound
SIBILANT = (2600.0, 6200.0)  # Hz
SYLLABLE = {"attack": 0.012, "decay": 0.07}  # s


def speech(seed: int, *, offset: float = 0.0) -> Rendered:
    """A mouth opens with every syllable, three to six a second within a word, voiced or not:
    because speech is what joint generators are judged by first, and its events are dense and of
    two kinds.

    A voiced syllable opens the mouth round and sounds at the pitch of the face's colour; an
    unvoiced one draws it wide and hisses.
    """
    uniform = uniform_of("speech", seed)
    look = choice(uniform, len(VOICES))
    times = _syllables(uniform)
    voiced = torch.tensor([uniform(0, 1) >= UNVOICED for _ in times]).double()
    size = torch.tensor([uniform(0.75, 1.0) for _ in times], dtype=torch.float64)
    t = picture_times()
    picture = _face(uniform, t, times, size, voiced, colour_of(look, len(VOICES)))
    t = sound_times(offset)
    since, _ = around(times, t)
    level = struck(since, **SYLLABLE) * _of_last(size, times, t)
    voiced = _of_last(voiced, times, t)
    voice = level * voiced * partials(since, VOICES[look], VOICE)
    consonants = level * (1 - voiced) * HISS * hiss(t, uniform, *SIBILANT)
    return rendered(picture, times, [voice, consonants])


def _syllables(uniform: Uniform) -> Tensor:
    """Beginnings of syllables, in words with pauses between, over the whole scene and beyond."""
    time, times = -MARGIN - uniform(1, 2), []
    while not times or times[-1] <= SECONDS + MARGIN:
        times.append(time)
        time += uniform(*SYLLABLE_GAP)
        time += uniform(*PAUSE) if uniform(0, 1) < PAUSES else 0.0
    return torch.tensor(times, dtype=torch.float64)


def _face(uniform: Uniform, t: Tensor, times: Tensor, size: Tensor, voiced: Tensor, colour: Tensor):
    """Pictures of a face whose mouth opens at once and closes slowly, as a syllable sounds."""
    y, x = grid()
    down, across = uniform(28, 32), uniform(28, 36)
    since, _ = around(times, t)
    gape = struck(since, attack=0.012, decay=0.085) * _of_last(size, times, t)
    voiced = _of_last(voiced, times, t)
    high = per_picture(1.2 + gape * (3.8 + 5.2 * voiced))
    wide = per_picture(9.0 + gape * (6.0 - 6.5 * voiced))
    picture = painted(
        frames(0.03, 0.03, 0.05), ellipse(y, x, (down, across), (27, 21)), _dim(colour)
    )
    for side in (-8, 8):
        eye = ellipse(y, x, (down - 7, across + side), (2.5, 3.5))
        picture = painted(picture, eye, torch.full((3,), 0.04))
    mouth = ellipse(y, x, (down + 12, across), (high, wide))
    return painted(picture, mouth, torch.tensor([0.05, 0.0, 0.0]))


def _dim(colour: Tensor) -> Tensor:
    return 0.38 * colour


def _of_last(values: Tensor, times: Tensor, t: Tensor) -> Tensor:
    """The value of the last event, at each time."""
    return values[torch.searchsorted(times, t, right=True) - 1]


# --- several --------------------------------------------------------------------------------------

MOVER_GAP = (0.5, 1.0)  # s
UNSEEN_GAP = (0.8, 1.6)  # s
HOPPER_PITCHES, SLIDER_PITCHES, UNSEEN_PITCHES = BANDS[3:7], BANDS[8:12], BANDS[:3]
FLOOR, POST = 54.0, 3.0  # px: where the hopper lands, how wide what the slider knocks against is


def several(seed: int, *, offset: float = 0.0) -> Rendered:
    """Two movers with sounds of their own, and a third source that is heard and never seen:
    because most footage has more than one source, and not every sound has a cause in view.

    A disc hops on a floor in one half, a block slides against a post in the other; the colour of
    each has a pitch, and they differ in timbre. Stems: hopper, slider, unseen.
    """
    uniform = uniform_of("several", seed)
    looks = [choice(uniform, len(HOPPER_PITCHES)), choice(uniform, len(SLIDER_PITCHES))]
    hops = draw_times(uniform, *MOVER_GAP)
    knocks = draw_times(uniform, *MOVER_GAP, taken=hops)
    seen = torch.cat([hops, knocks])
    unseen = draw_times(uniform, *UNSEEN_GAP, taken=seen)
    left, right = (0, SIZE / 2) if uniform(0, 1) < 0.5 else (SIZE / 2, 0)
    picture = frames(0.06, 0.07, 0.12)
    picture = _hopper(picture, hops, left + uniform(12, 20), left, looks[0])
    picture = _slider(picture, knocks, uniform(20, 44), right, looks[1])
    t = sound_times(offset)
    hop, knock, thud = (around(times, t)[0] for times in (hops, knocks, unseen))
    stems = [
        struck(hop, attack=0.002, decay=0.08)
        * partials(hop, HOPPER_PITCHES[looks[0]], {1: 0.35, 2: 0.1}),
        struck(knock, attack=0.002, decay=0.05)
        * partials(knock, SLIDER_PITCHES[looks[1]], {1: 0.4, 1.5: 0.2}),
        struck(thud, attack=0.004, decay=0.1)
        * partials(thud, UNSEEN_PITCHES[choice(uniform, len(UNSEEN_PITCHES))], {1: 0.5, 2: 0.1}),
    ]
    return rendered(picture, seen, stems, unseen)


def _hopper(picture: Tensor, times: Tensor, across: float, edge: float, look: int) -> Tensor:
    """A disc on arcs between landings; the floor of its half lights up under it."""
    y, x = grid()
    since, until = around(times, picture_times())
    colour = colour_of(look, 8)
    floor = box(y, x, (FLOOR + 8, edge + SIZE / 4), (8, SIZE / 4))
    light = 0.25 + 0.6 * torch.exp(-since / 0.07)
    picture = painted(picture, floor, light[:, None, None, None] * (0.5 + 0.5 * colour))
    height = per_picture(130 * since * until)  # px; a gap of 1 s rises 33
    return painted(picture, ellipse(y, x, (FLOOR - 7 - height, across), (7, 7)), colour)


def _slider(picture: Tensor, times: Tensor, down: float, edge: float, look: int) -> Tensor:
    """A block that slides away from a post and back against it; the post lights up."""
    y, x = grid()
    since, until = around(times, picture_times())
    colour = colour_of(4 + look, 8)
    post = box(y, x, (SIZE / 2, edge + POST + 1), (SIZE / 2, POST))
    light = 0.25 + 0.6 * torch.exp(-since / 0.07)
    picture = painted(picture, post, light[:, None, None, None] * (0.5 + 0.5 * colour))
    away = per_picture(56 * since * until)  # px; a gap of 1 s slides 14
    return painted(picture, box(y, x, (down, edge + 2 * POST + 7 + away), (6, 5)), colour)


# --- weak -----------------------------------------------------------------------------------------

WEAK_GAP = (0.35, 0.9)  # s
WEAK_PITCHES = BANDS[4:12]  # Hz
PILOT = 5.5  # px, half of its side: 121 of 4096 pixels, 3 % of the picture


def weak(seed: int, *, offset: float = 0.0) -> Rendered:
    """Something small dims or ducks, three per cent of the picture, and a clear tone is heard:
    because the picture's cue is often the weaker half, as with a finger on a key.

    A pilot lamp on a dark panel of dead ones dims by two thirds, or a key ducks by half its height;
    its colour has a pitch.
    """
    uniform = uniform_of("weak", seed)
    look = choice(uniform, len(WEAK_PITCHES))
    times = draw_times(uniform, *WEAK_GAP)
    place = uniform(16, 48), uniform(12, 52)
    picture = _panel(uniform, times, place, look, ducks=uniform(0, 1) < 0.5)
    since, _ = around(times, sound_times(offset))
    tone = partials(since, WEAK_PITCHES[look], {1: 0.4, 2: 0.15, 3: 0.06})
    return rendered(picture, times, [struck(since, attack=0.003, decay=0.07) * tone])


def _panel(uniform: Uniform, times: Tensor, place: tuple, look: int, *, ducks: bool) -> Tensor:
    """A panel lit from one side, and on it what dims or ducks at each event, and comes back."""
    y, x = grid()
    lit = 0.10 + 0.10 * (
        (x - SIZE / 2) / SIZE * uniform(-1, 1) + (y - SIZE / 2) / SIZE * uniform(-1, 1)
    )
    picture = frames(0.9, 0.95, 1.1) * lit[..., None]
    for row in (8, 32, 56):
        picture = painted(picture, box(y, x, (row, SIZE / 2), (1, 28)), torch.full((3,), 0.2))
    since, _ = around(times, picture_times())
    down = struck(since, attack=0.012, decay=0.09)
    colour = colour_of(look, len(WEAK_PITCHES))
    if ducks:
        half = per_picture(PILOT * (1 - 0.6 * down))
        # Its lower edge stays: what ducks is the upper one.
        return painted(
            picture, box(y, x, (place[0] + PILOT - half, place[1]), (half, PILOT)), colour
        )
    light = (1 - 0.67 * down)[:, None, None, None]
    return painted(picture, box(y, x, place, (PILOT, PILOT)), light * colour)


# --- out of distribution --------------------------------------------------------------------------

SLATS = 8
QUICKENING = (0.72, 0.80)  # each gap to the one before it
LONGEST = (0.55, 0.75)  # s: a run's first gap
SHORTEST = 0.22  # s: before a shorter gap the next run begins
BELLS = BANDS[3:9]  # Hz
BELL = {1: 0.36, 2.76: 0.18, 5.4: 0.08}  # multiples of a free bar's modes: no harmonics


def blinds(seed: int, *, offset: float = 0.0) -> Rendered:
    """Out of distribution, never trained on: slats over the whole picture spring open, in runs that
    quicken as a dropped coin's do, to bells whose partials are no harmonics.

    Another look (stripes that let light through), rhythm and timbre than any family has. The
    light's colour has a pitch.
    """
    uniform = uniform_of("blinds", seed)
    look = choice(uniform, len(BELLS))
    times = _quickening(uniform)
    picture = _slats(times, colour_of(look, len(BELLS), 0.7), uniform(0, SIZE / SLATS))
    since, _ = around(times, sound_times(offset))
    bell = struck(since, attack=0.008, decay=0.12) * partials(since, BELLS[look], BELL)
    return rendered(picture, times, [bell])


def _quickening(uniform: Uniform) -> Tensor:
    """Runs of events, each gap shorter than the one before, over the whole scene and beyond."""
    time, gap, times = -MARGIN - uniform(1, 2), uniform(*LONGEST), []
    while time < SECONDS + MARGIN + LONGEST[1]:
        times.append(time)
        time += gap
        gap *= uniform(*QUICKENING)
        if gap < SHORTEST:
            gap = uniform(*LONGEST)
    return torch.tensor(times, dtype=torch.float64)


def _slats(times: Tensor, colour: Tensor, first: float) -> Tensor:
    """Upright slats that turn open at each event, and slowly shut."""
    _, x = grid()
    since, _ = around(times, picture_times())
    pitch = SIZE / SLATS
    off = ((x - first) % pitch - pitch / 2).abs()  # px from the middle of the gap
    half = per_picture(0.4 + 2.2 * struck(since, attack=0.012, decay=0.09))
    light = inside(half - off).expand(-1, SIZE, -1)
    return painted(frames(0.07, 0.06, 0.05), light, 0.8 * colour)


# --- by name --------------------------------------------------------------------------------------

FAMILIES: dict[str, Family] = {
    "impacts": render,
    "speech": speech,
    "several": several,
    "weak": weak,
}
OUT_OF_DISTRIBUTION: dict[str, Family] = {"blinds": blinds}


def find_family(name: str) -> Family:
    """The family of that name, or the one out of distribution.

    Raises ValueError for another name.
    """
    known = FAMILIES | OUT_OF_DISTRIBUTION
    if name not in known:
        raise ValueError(f"family: expected one of {', '.join(known)}, got {name!r}")
    return known[name]
