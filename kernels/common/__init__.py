"""What all kernel families share: launching, packed bits, noise, rounding, memory layout, seeds, checks of options."""
