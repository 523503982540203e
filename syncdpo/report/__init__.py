"""What a run did, as one page of html that needs nothing beside it and loads nothing.

`run` is the page of any training run, from its folder alone; `players` shows clips with what is
seen and heard in them, `curves` draws figures by step, and `page` is what all pages look like.
"""

from .run import write_run_report

__all__ = ["write_run_report"]
