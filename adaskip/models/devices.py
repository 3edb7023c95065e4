"""The device and the dtype a model is loaded on and in."""

from __future__ import annotations

import torch

from adaskip.errors import AdaskipError, unknown_name

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(device: torch.device | str | None = None) -> torch.device:
    """The device asked for, or the default one.

    Raises:
        AdaskipError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise AdaskipError(
            f"Unknown device {device!r}: give cpu, cuda or cuda:<number>."
        ) from error
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= n_cuda:
        raise AdaskipError(
            f"Device {str(device)!r} is not available: {n_cuda} CUDA devices were found. Give cpu."
        )
    return found


def resolve_dtype(
    dtype: torch.dtype | str | None = None, device: torch.device | None = None
) -> torch.dtype:
    """The dtype asked for, or the default of a device: bfloat16 on CUDA, float32 elsewhere.

    Raises:
        AdaskipError: a dtype that models are not loaded in.
    """
    if dtype is None:
        return torch.bfloat16 if device is not None and device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return DTYPES[name]
