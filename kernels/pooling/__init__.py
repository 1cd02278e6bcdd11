"""Pooled maps: block means of a convolution's input, and the weight gradient against them. See reference.py."""

from actpress.kernels.pooling.op import conv2d_weight_grad, pool
from actpress.kernels.pooling.reference import ALIGN, PooledConv, pool_max, upsample_reference

__all__ = ["ALIGN", "PooledConv", "conv2d_weight_grad", "pool", "pool_max", "upsample_reference"]
