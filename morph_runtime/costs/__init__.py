"""Measuring what steps and shifts cost on the device at hand: the model itself is `morph_runtime.morph.costs`."""
