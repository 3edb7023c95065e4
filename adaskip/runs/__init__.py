"""Experiments: running, keeping and scoring configurations."""
