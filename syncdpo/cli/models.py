"""The command `check-model`: whether a model of one's own does what training asks of it."""

from __future__ import annotations

from typing import Annotated

import typer

from syncdpo.cli.options import FORMAT, PARTS, load, say, with_options


@with_options(PARTS | FORMAT)
def check_model(
    model: Annotated[str, typer.Argument(help="module:Class, or any other that train takes.")],
    caption: Annotated[str, typer.Option(help="To encode and to sample.")] = "",
    generate: Annotated[bool, typer.Option(help="Make clips, too, in two steps.")] = True,
    **options,
) -> None:
    """Call every member of a model on a made clip: does it do what training asks of it?"""
    from syncdpo.models import check_model as check

    findings = check(load(model, **options), caption=caption, generates=generate)
    for finding in findings:
        say(str(finding))
    failed = [finding.member.strip() for finding in findings if finding.passed is False]
    if failed:
        raise ValueError(f"model: {model} does not follow the protocol in {', '.join(failed)}")
