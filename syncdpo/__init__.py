"""Post-train joint video-audio generators to keep time (SyncDPO, arXiv 2605.12179)."""

from importlib.metadata import version

__version__ = version("syncdpo")
