"""Checkpoints and how their weights are laid out in memory at each precision."""
