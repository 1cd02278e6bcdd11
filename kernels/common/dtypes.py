"""Dtypes that references compute in."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 tensors, fp32 for all others."""
    return dtype if dtype == torch.float64 else torch.float32
