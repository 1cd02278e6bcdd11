"""Measurements of a model and a method. All sizes are bytes, all times seconds.

saved.py        bytes that autograd saves for backward: exact, and the same on every device
predict.py      saved bytes of a training step, predicted with fake tensors, which need no memory
memory.py       peak bytes; whether an exception means out of memory
speed.py        items per second
gradients.py    gradients under a method compared with exact ones
derivatives.py  error of the derivatives of activations that a codec approximates
audit.py        actpress.audit: saved bytes of each module
check.py        actpress.check: saved bytes, gradients and step time of a method on one's own model

Saved bytes are not peak bytes: a step also holds weights, gradients and temporary tensors. Report both.
"""

from actpress.measure.gradients import Fidelity, fidelity, gradient_fidelity, gradients
from actpress.measure.memory import is_out_of_memory, peak_bytes, peak_reserved
from actpress.measure.predict import fake_model, predicted_memory
from actpress.measure.saved import SavedBytes, saved_bytes, storage_key
from actpress.measure.speed import Throughput, items_per_second, throughput

__all__ = [
    "Fidelity",
    "SavedBytes",
    "Throughput",
    "fake_model",
    "fidelity",
    "gradient_fidelity",
    "gradients",
    "is_out_of_memory",
    "items_per_second",
    "peak_bytes",
    "peak_reserved",
    "predicted_memory",
    "saved_bytes",
    "storage_key",
    "throughput",
]
