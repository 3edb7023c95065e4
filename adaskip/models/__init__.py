"""Models: what is known of them, and loading them without a hub or remote code."""

from adaskip.models.loading import load_model, load_tokenizer, random_model
from adaskip.models.spec import ModelSpec, model_names, model_spec

__all__ = [
    "ModelSpec",
    "load_model",
    "load_tokenizer",
    "model_names",
    "model_spec",
    "random_model",
]
