"""The micro-batches of one optimizer step, kept until all of them are there."""

from dataclasses import dataclass, field, replace
from typing import Any

from lightning_eoss.curvature.batches import Batch, Part, copied
from lightning_eoss.isolation.isolate import noted_generators


@dataclass
class Window:
    """What the step that comes is made of."""

    begins: bool = True  # whether the next micro-batch is the first of a step
    parts: list[Part] = field(default_factory=list)

    def collect(self, batch: Any, size: int, *, copy: bool) -> None:
        """Keeps a micro-batch: a window is measured at once, each part with the random numbers of its own pass.

        Args:
            batch: What training is about to evaluate.
            size: Its samples.
            copy: Whether training changes what it is given before the window is measured.
        """
        self.parts.append(Part(1.0, size, data=copied(batch) if copy else batch, generators=noted_generators()))

    def close(self) -> Batch:
        """Hands out what was kept, and forgets it."""
        parts, self.parts = self.parts, []
        return tuple(replace(part, weight=1 / len(parts)) for part in parts)
