"""actpress: shrink the activations kept for the backward pass, and measure what that buys.

report = actpress.apply(model, actpress.methods.Division(bits=2))
"""

from actpress import measure, methods
from actpress.measure.audit import Audit, audit
from actpress.measure.check import Check, check
from actpress.swap import Report, apply, compose, restore

__all__ = ["Audit", "Check", "Report", "apply", "audit", "check", "compose", "measure", "methods", "restore"]
