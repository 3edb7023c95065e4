"""Observations: IO similarity of layers and sublayers, and how stable a choice is."""
