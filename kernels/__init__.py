"""Kernels: how a tensor is packed and unpacked, one file per family. The plain PyTorch reference comes first in each."""
