"""The pages in Chromium: films play, with sound at a click, and their content can be told apart."""

import io

import numpy as np
import pytest
from browser import CHROMIUM, Page
from PIL import Image

from syncdpo.data.clips import write_clip
from syncdpo.data.synthetic import render_clip
from syncdpo.report.page import page
from syncdpo.report.players import Shown, gallery

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
FIRST = "document.querySelector('video')"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    clips = []
    for seed in range(3):
        write_clip(folder / f"{seed}.mp4", render_clip(seed))
        clips.append(Shown(folder / f"{seed}.mp4"))
    body, width = gallery([("one", clips), ("other", clips[:2])])
    (folder / "page.html").write_text(page("clips", body, width=width))
    with Page(folder / "page.html", folder / "profile") as opened:
        yield opened, clips


def test_a_click_plays_with_sound_and_another_stops(shown):
    opened, _ = shown
    opened.click("video")
    opened.wait_for(f"{FIRST}.currentTime > 0.2")
    assert opened.evaluate(f"[{FIRST}.paused, {FIRST}.muted, {FIRST}.error]") == [
        False,
        False,
        None,
    ]
    # The cursor goes with it: 1000 is the whole clip of two seconds.
    opened.wait_for("+document.querySelector('.cursor').getAttribute('x1') > 100")
    opened.click("video")
    assert opened.evaluate(f"{FIRST}.paused")


def test_a_row_plays_silently_side_by_side(shown):
    opened, _ = shown
    opened.click("video")  # one with sound makes room for all
    opened.click("button.all")
    opened.wait_for("videos.slice(0, 3).every(v => v.currentTime > 0 && !v.paused && v.muted)")
    assert opened.evaluate("videos.slice(3).every(v => v.paused)")
    opened.click("button.all")
    assert opened.evaluate("videos.every(v => v.paused)")


def test_what_is_in_the_clips_can_be_seen(shown):
    """Before anything plays: a lit floor, a coloured ball, neither of them lost in black."""
    opened, clips = shown
    opened.ask("Page.reload")
    opened.wait_for("document.readyState === 'complete'")
    opened.wait_for("[...document.querySelectorAll('video')].every(v => v.readyState >= 1)")
    box = opened.evaluate(
        f"(() => {{ const r = {FIRST}.getBoundingClientRect(); return [r.x, r.y + scrollY, r.width,"
        "r.height]; })()"
    )
    assert box[2:] == [192, 192]
    image = Image.open(io.BytesIO(opened.screenshot())).convert("RGB")
    left, top, width, height = map(round, box)
    picture = np.asarray(image.crop((left, top, left + width, top + height)), dtype=float)
    dark = clips[0].clip.video.float().mean().item()
    assert picture.mean() > 1.5 * dark
    assert picture.max() > 230
    assert np.percentile(picture, 90) - np.percentile(picture, 10) > 60
