"""The MorphServe engine: an LLM runtime whose layers change precision while it serves.

Knows nothing of Triton. `docs/architecture.md` is the map of the rooms.
"""

__version__ = "0.1.0"
