"""One trace against several configurations of one server: static rungs and morphing, repeats interleaved."""

from __future__ import annotations
