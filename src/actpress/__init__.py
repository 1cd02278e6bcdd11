"""actpress: shrink the activations kept for the backward pass, and measure what that buys.

report = actpress.apply(model, actpress.methods.Division(bits=2))
"""

from actpress import measure, methods
from actpress.audit import Audit, audit
from actpress.swap import Report, apply, compose, restore

__all__ = ["Audit", "Report", "apply", "audit", "compose", "measure", "methods", "restore"]
