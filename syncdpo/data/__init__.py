"""Clips from media files, clips rendered, and clips as latents."""
