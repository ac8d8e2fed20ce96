"""The launcher: `python -m morph_backend.launcher` runs a real Triton, without Docker, with the model in it."""

from morph_backend.launcher.cli import main

__all__ = ["main"]
