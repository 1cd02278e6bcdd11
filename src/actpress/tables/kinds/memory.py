"""Tables of memory: bytes of one training step, predicted with fake tensors. No data and no device are needed."""

import hydra

from actpress.measure import predicted_memory
from actpress.tables.kind import Computed, Measured, Measurement
from actpress.train import provenance


class Memory(Computed):
    """Metrics are keys of what measure.predicted_memory returns."""

    origin = "predicted"
    suffix = " (fake tensors)"
    how = "Predicted with fake tensors"

    def measure(self, measurement: Measurement) -> Measured:
        cfg = measurement.config
        numbers = predicted_memory(
            lambda: hydra.utils.instantiate(cfg.model),
            hydra.utils.instantiate(cfg.method),
            cfg.recipe.batch_size,
            cfg.data.image_size,
            cfg.runtime.precision,
        )
        return Measured(numbers | {"seed": measurement.seed}, provenance.environment("cpu"))

    def cost(self, measurement: Measurement) -> str:
        return "to predict with fake tensors, a second, no data"


KIND = Memory()
