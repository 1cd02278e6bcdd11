"""How exact derivatives of activations have to be that are computed from the output and one bit."""

# (max, rms for N(0, 1) inputs) of |d - f'|. GELU and SiLU: the target, reachable with two rational functions by an independent
# computation, bf16 GELU at the floor. The others have no published target: what is reached, rounded up in the second digit.
# new_gelu, fast_gelu, quick_gelu and swish round their forward pass several times, which moves their floor up.
LIMITS = {
    ("gelu", "bf16"): (0.0107, 0.00145),
    ("gelu", "fp16"): (0.0065, 0.00042),
    ("gelu", "fp32"): (1.6e-4, 2.9e-6),
    ("gelu", "fp64"): (1.7e-6, 1.1e-6),
    ("silu", "bf16"): (0.0150, 0.0017),
    ("silu", "fp16"): (0.0048, 0.00035),
    ("silu", "fp32"): (1.2e-4, 1.7e-6),
    ("silu", "fp64"): (8.5e-7, 5.4e-7),
    ("gelu_tanh", "bf16"): (0.0107, 0.0015),
    ("gelu_tanh", "fp16"): (0.0036, 0.00029),
    ("gelu_tanh", "fp32"): (1.6e-4, 1.4e-6),
    ("gelu_tanh", "fp64"): (1.7e-6, 1.1e-6),
    ("quick_gelu", "bf16"): (0.0154, 0.0021),
    ("quick_gelu", "fp16"): (0.0062, 0.00044),
    ("quick_gelu", "fp32"): (1.6e-4, 1.0e-6),
    ("quick_gelu", "fp64"): (8.5e-7, 5.1e-7),
    ("new_gelu", "bf16"): (0.028, 0.0031),
    ("new_gelu", "fp16"): (0.0099, 0.00061),
    ("new_gelu", "fp32"): (1.6e-4, 1.4e-6),
    ("fast_gelu", "bf16"): (0.028, 0.0031),
    ("fast_gelu", "fp16"): (0.0099, 0.00071),
    ("fast_gelu", "fp32"): (1.9e-4, 1.4e-6),
    ("swish", "bf16"): (0.017, 0.0022),
    ("swish", "fp16"): (0.0067, 0.00042),
    ("swish", "fp32"): (1.2e-4, 8.5e-7),
}
