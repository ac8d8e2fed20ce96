"""Decoder families: one decoder, driven by a model's specification."""
