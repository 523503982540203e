"""The demonstration: a small generator learns to keep time, on a laptop, in minutes.

`demonstration` trains, samples and measures, `report` is the page that it ends in, `trials` found
its settings, and `base` made the weights that it starts from.
"""

from .demonstration import DemoConfig, format_table, run

__all__ = ["DemoConfig", "format_table", "run"]
