"""Morphing: which layers run at which precision, how they change, and who decides."""
