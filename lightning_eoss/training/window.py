"""The micro-batches of one optimizer step, kept until all of them are there."""

from dataclasses import dataclass, field
from typing import Any

from lightning_eoss.curvature.isolation import noted_generators
from lightning_eoss.curvature.objective import Batch, Part, copied, num_samples_of


@dataclass
class Window:
    """What the step that comes is made of."""

    begins: bool = True  # whether the next micro-batch is the first of a step
    parts: list[Part] = field(default_factory=list)

    def collect(self, batch: Any, count: int) -> None:
        """Keeps a micro-batch: a window is measured at once, each part with the random numbers of its own pass.

        Args:
            batch: What training is about to evaluate.
            count: Micro-batches of a step.
        """
        data = batch if count == 1 else copied(batch)
        self.parts.append(Part(1 / count, num_samples_of(batch), data=data, generators=noted_generators()))

    def close(self) -> Batch:
        """Hands out what was kept, and forgets it."""
        parts, self.parts = tuple(self.parts), []
        return parts
