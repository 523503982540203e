"""The commands `demo`, `tune` and `compare-rules`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from syncdpo.cli.options import Jobs, OffsetSpread, Output, Result, Samples, Seed, Steps, given, say


def demo(
    output: Output = Path("runs/demo"),
    clips: Annotated[
        Path | None, typer.Option(help="Folder of your own clips, instead of rendered ones.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Training steps of SFT and SyncDPO; default 60, of your own clips 360."
        ),
    ] = None,
    samples: Samples = 128,
    seed: Seed = 0,
    offset_spread: OffsetSpread = None,
) -> None:
    """Watch a small generator learn to keep time: minutes on two CPU cores, no downloads."""
    from syncdpo.demo import DemoConfig, format_table, run

    if clips and offset_spread:
        raise ValueError(
            "offset-spread: expected 0 with your own clips, which stay as they are, "
            f"got {offset_spread:g}"
        )
    spread = given({"offset_spread": offset_spread})
    report = run(DemoConfig(output, clips, steps, samples, seed=seed, **spread))
    typer.echo(format_table(report))
    say(f"\nOpen {output / 'report.html'}")


def tune(
    output: Output = Path("runs/tune"),
    result: Result = Path("benchmarks/results/tune.json"),
    steps: Steps = 60,
    samples: Samples = 64,
    jobs: Jobs = 2,
    offset_spread: OffsetSpread = None,
) -> None:
    """Find each method's weights and learning rate, on noise that the demo never measures on."""
    from syncdpo.demo import DemoConfig
    from syncdpo.demo.trials import tune as find

    config = DemoConfig(
        output,
        steps=steps,
        samples=samples,
        purpose="validation",
        progress=False,
        **given({"offset_spread": offset_spread}),
    )
    typer.echo(find(config, result, jobs))


def compare_rules(
    output: Output = Path("runs/rules"),
    result: Result = Path("benchmarks/results/rules.json"),
    steps: Steps = 60,
    samples: Samples = 48,
    jobs: Jobs = 2,
) -> None:
    """What each rule teaches: constant and rising difficulty, matched or not, on three seeds."""
    from syncdpo.demo import DemoConfig
    from syncdpo.demo.trials import compare_rules as compare

    config = DemoConfig(output, steps=steps, samples=samples, purpose="validation", progress=False)
    typer.echo(compare(config, result, jobs))
