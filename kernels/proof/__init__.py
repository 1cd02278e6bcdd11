"""How kernels are proven without a GPU: the registry of cases, and the comparison with the reference."""
