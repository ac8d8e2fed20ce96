"""MorphServe on Triton. The model itself is `morph_backend.model`."""

from morph_backend.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
