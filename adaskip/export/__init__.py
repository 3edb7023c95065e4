"""Writes a model under a plan as an ordinary checkpoint, for transformers, vLLM and llama.cpp."""
