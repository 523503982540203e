"""What all pages have in common: their look, their script, and pictures that are part of them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from string import Template

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The picture is lifted by a gamma, not by a factor: what is bright keeps its colour.
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2127; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
p { max-width: 62rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #dfe3e8 }
th:first-child, td:first-child { text-align: left } tr.best { font-weight: 600 }
tr.real { color: #5c6570 } table.settings td { text-align: left; font-family: monospace }
table.settings tr.chosen { font-weight: 600 } img { max-width: 100% }
p.note, figcaption { color: #5c6570; font-size: .85rem }
ul.warnings { background: #fff4e0; border-left: 4px solid #d08c2e; padding: .6rem 1rem .6rem 2rem }
.row { display: grid; grid-template-columns: repeat(auto-fill, $width); gap: .8rem }
figure { margin: 0 } figcaption { line-height: 1.3 }
video { display: block; width: 100%; background: #111; cursor: pointer; border-radius: 3px }
video.small { image-rendering: pixelated } video.dark { filter: url(#lift) }
video.playing { outline: 3px solid #1f77b4 } video.playing.heard { outline-color: #1a7f37 }
.events { display: block; width: 100%; height: 34px; background: #f4f6f8 }
.events line { vector-effect: non-scaling-stroke; stroke-width: 3 }
.events .middle { stroke: #c3c9d0; stroke-width: 1 } .events .seen { stroke: #1c2127 }
.events .met { stroke: #1a7f37 } .events .alone { stroke: #cf222e }
.events .cursor { stroke: #1f77b4; stroke-width: 1 }
button { font: inherit; font-size: .85rem; margin-left: .6rem; cursor: pointer }
</style></head><body>
<svg width="0" height="0" style="position:absolute" aria-hidden="true"><filter id="lift"
color-interpolation-filters="sRGB"><feComponentTransfer><feFuncR type="gamma" exponent="$gamma"/>
<feFuncG type="gamma" exponent="$gamma"/><feFuncB type="gamma" exponent="$gamma"/>
</feComponentTransfer></filter></svg>
$body
<script>
const videos = [...document.querySelectorAll("video")];
function stop(video) { video.pause(); video.classList.remove("playing", "heard"); }
function start(video, heard) {
  video.muted = !heard;
  video.currentTime = 0;
  video.classList.add("playing");
  video.classList.toggle("heard", heard);
  return video.play();
}
function toggle(video) {
  const on = video.classList.contains("heard");
  videos.forEach(stop);
  if (!on) start(video, true);
}
videos.forEach(video => {
  video.addEventListener("click", () => toggle(video));
  video.addEventListener("keydown", event => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(video); }
  });
});
document.querySelectorAll("button.all").forEach(button => button.addEventListener("click", () => {
  const row = [...button.parentElement.nextElementSibling.querySelectorAll("video")];
  const on = row.every(video => video.classList.contains("playing"));
  videos.forEach(stop);
  if (!on) row.forEach(video => start(video, false));
}));
function move() {
  for (const video of videos) {
    if (!video.duration) continue;
    const cursor = video.parentElement.querySelector(".cursor");
    const x = 1000 * video.currentTime / video.parentElement.dataset.seconds;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
  }
  requestAnimationFrame(move);
}
move();
</script></body></html>
""")
GAMMA = 0.55


def page(title: str, body: str, *, width: str = "13rem") -> str:
    """A whole page. width: of a clip."""
    return PAGE.substitute(title=html.escape(title), body=body, width=width, gamma=GAMMA)


def table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """rows: (class, cells)."""
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in header)
    lines = (
        f'<tr class="{style}">{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
        for style, cells in rows
    )
    head = f"<thead><tr>{titles}</tr></thead>" if header else ""
    return f'<table class="{kind}">{head}<tbody>{"".join(lines)}</tbody></table>'


def picture(figure: plt.Figure, about: str) -> str:
    """A figure as part of the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return f'<img alt="{html.escape(about)}" src="{embedded("image/png", buffer.getvalue())}">'


def embedded(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
