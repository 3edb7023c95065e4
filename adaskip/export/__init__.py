"""Writes a model under a plan as an ordinary checkpoint, for transformers, vLLM and llama.cpp."""

from adaskip.export.exporting import export_checkpoint
from adaskip.export.report import Check, ExportReport

__all__ = ["Check", "ExportReport", "export_checkpoint"]
