"""Packs: a model prepared once, so that a server starts fast and a wrong or stale copy is refused with a reason.

`python -m morph_runtime.pack` (or `morph pack`) makes and verifies them.
"""
