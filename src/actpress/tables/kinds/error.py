"""Tables of errors: how exact the derivative of an activation is that a method computes from what it saves."""

import hydra
from torch import nn

from actpress.measure import derivatives
from actpress.tables.kind import Computed, Measured, Measurement
from actpress.train import provenance


class Error(Computed):
    """Metrics are fields of what measure.derivatives.derivative_error returns; a row sets derivative.variant and derivative.dtype."""

    how = "Computed"

    def measure(self, measurement: Measurement) -> Measured:
        cfg = measurement.config
        replacement = hydra.utils.instantiate(cfg.method).rules()[nn.GELU]
        found = derivatives.derivative_error(replacement.codec, cfg.derivative.variant, cfg.derivative.dtype)
        return Measured(found._asdict() | {"seed": measurement.seed}, provenance.environment("cpu"))

    def cost(self, measurement: Measurement) -> str:
        return "to compute for every input, a second, no data"


KIND = Error()
