"""`WeightDistanceMonitor`: how far a running training has gone, by which law, and whether it walks at random."""

import math
from copy import copy
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_eoss import checks
from lightning_eoss.display import tags
from lightning_eoss.display.scalars import finite
from lightning_eoss.linalg.sketch import count_sketch
from lightning_eoss.theory.random_walk import DistanceLaws, angle, distance_laws, next_look
from lightning_eoss.training.monitor import Publisher
from lightning_eoss.training.watch import HISTORY, Watch

SMALL = 2**22  # parameters, up to which a copy of them is kept by default
SKETCH = 8192  # dimension of a projection by default, and of those that angles are had from


class WeightDistanceMonitor(Publisher):
    r"""Shows, while a model trains, its distance from where it began, and whether that grows like :math:`\log t`.

    Not one bit of training is changed. Before the step after t steps, to every logger: the distance
    :math:`|w_t - w_0|` of all trained parameters and of each layer; the slope c of :math:`a + c \log t` and the share
    :math:`R^2` of the distances' variance that this law explains from step 30 on, beside a power law's exponent and
    share at the same points; the angle between the last two displacements, from look to look (90 degrees: a random
    walk). What is not known yet is not logged: the laws ask for five looks, the last at twice the step of the first.

    :math:`w_0` is where the first fit of this monitor begins, t counts the steps since, and both live on in later fits
    and in checkpoints. A look reads the parameters once and needs no gradient; between looks nothing is done. It keeps
    one copy of the parameters, or their random projection to k numbers for each layer, in which squared lengths have a
    relative standard deviation of :math:`\sqrt{2 / k}` and lengths of half of that (1.6 % and 0.8 % for k = 8,192).
    Angles always come from projections, of the whole, with a standard deviation of up to 0.6 degrees; models of up to k
    parameters are projected without error.

    **Checkpoints** hold what the monitor holds, so that a resumed run goes on exactly. With a copy they grow by the
    size of the trained parameters, with a projection by 64 KiB for each layer; how much it is, is announced at the
    start.

    Args:
        every_n_train_steps: Look before every n-th step. The laws' points then crowd at the end in :math:`\log t`.
        points_per_decade: In its absence: looks while the steps grow tenfold, evenly in :math:`\log t`.
        projection: Dimension k of the random projection. None: a copy of up to 4,194,304 parameters (exact), and k =
            8,192 above.
        layer_depth: How many components of a parameter's name, its own left out, make a layer: with 2 `net.0.weight`
            and `net.0.bias` are `net.0`, and a transformer's blocks may be one layer. 0: no layers.
        seed: Chooses the projection.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: At the start, if the strategy shards the parameters.

    Example:
        >>> WeightDistanceMonitor(every_n_train_steps=100).every_n_train_steps
        100

    Source: Hoffer, Hubara and Soudry, "Train longer, generalize better", sections 3 and 4, Figures 2 and 4.
    """

    dashboard_categories = frozenset({tags.WEIGHTS})  # what it shows on the dashboard

    def __init__(
        self,
        *,
        every_n_train_steps: int | None = None,
        points_per_decade: int = 20,
        projection: int | None = None,
        layer_depth: int = 2,
        seed: int = 0,
    ) -> None:
        optional = {"every_n_train_steps": every_n_train_steps, "projection": projection}
        for name, value in {**optional, "points_per_decade": points_per_decade}.items():
            words = "must be at least 1, or left out: nothing would be seen."
            checks.whole(name, value, 1, words, none=name in optional)
        for name, value in {"layer_depth": layer_depth, "seed": seed}.items():
            checks.whole(name, value, 0, "must be at least 0, or left out: nothing would be seen.")
        self.every_n_train_steps = every_n_train_steps
        self.points_per_decade = points_per_decade
        self.projection = projection
        self.layer_depth = layer_depth
        self.seed = seed
        self.watch = Watch(type(self).__name__)
        self._shapes: dict[str, list[int]] = {}  # of the parameters that were trained at w_0, by name
        self._kept = 0  # dimension of the sketches of w_0; 0: it is a copy
        self._initial: list[Tensor] = []  # w_0: a copy of each parameter, or a sketch of each layer
        self._last: list[Tensor] = []  # sketches of the weights at the last look, and of the displacement before it
        self._points: list[list[float]] = []  # t and distance
        self._begun = 0  # the Trainer's step at w_0
        self._done: int | None = None  # t at the end of an earlier fit; None: `_begun` is right
        self._due = 1  # t of the next look

    @property
    def points(self) -> list[list[float]]:
        """Steps and distances of all looks, which the laws are fitted to."""
        return self._points

    @property
    def latest(self) -> DistanceLaws:
        """Both laws as fitted to all looks so far; NaN where it is too early."""
        return distance_laws(*np.array(self._points, dtype=float).reshape(-1, 2).T)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses parameters that no process has all of."""
        strategy = type(trainer.strategy).__name__
        if stage == "fit" and any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise MisconfigurationException(
                f"{type(self).__name__} does not support strategy={strategy}: parameters are sharded, and no process "
                "sees how far all of them have gone. Train with another strategy, or without this callback."
            )
        self.watch.count_twins(trainer, self)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keeps w_0, unless an earlier fit has."""
        self.watch.begin()
        lazy = [name for name, parameter in pl_module.named_parameters() if is_lazy(parameter)]
        if lazy:
            self.watch.say(f"{', '.join(lazy)} have no values before the first step, and are left out.")
        there = {name: each for name, each in pl_module.named_parameters() if name not in lazy}
        if self._initial and all(name in there and list(there[name].shape) == x for name, x in self._shapes.items()):
            self._begun = self._begun if self._done is None else trainer.global_step - self._done
        else:
            if self._initial:
                self.watch.say("these are not the parameters of the first fit, so distances start anew.")
            self._shapes = {name: list(each.shape) for name, each in there.items() if each.requires_grad}
            self._initial, self._points, self._begun, self._due = [], [], trainer.global_step, self._after(0)
            self._keep(pl_module)
        self._done = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Looks before the step, where it is time."""
        t = trainer.global_step - self._begun
        if not self._initial or t < self._due:
            return
        self._due = self._after(t)
        with self.watch.forgiving(first=False):
            self.watch.publish(trainer, self, self._look(pl_module, t))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notes how many steps were made, should another Trainer go on from here."""
        self._done = trainer.global_step - self._begun

    def _after(self, t: int) -> int:
        """The next look's t."""
        every = self.every_n_train_steps
        return next_look(t, self.points_per_decade) if every is None else (t // every + 1) * every

    def _keep(self, pl_module: Any) -> None:
        """Keeps w_0 and says what that takes."""
        layers = self._layers(pl_module)
        if not layers:
            self.watch.say("nothing is trained, so there is no distance to show.")
            return
        count = sum(tensor.numel() for layer in layers.values() for tensor in layer)
        self._kept = self.projection or (0 if count <= SMALL else SKETCH)
        sketches = count_sketch(list(layers.values()), self._kept or SKETCH, self.seed)
        copies = [tensor.clone() for layer in layers.values() for tensor in layer] if not self._kept else None
        self._initial, self._last = copies or [sketches], [sketches.sum(0)]
        size = sum(each.nbytes for each in (*self._initial, *self._last, *self._last)) / 2**20
        what = f"random projections to {self._kept:,} numbers" if self._kept else "a copy"
        self.watch.announce([f"distances of {count:,} parameters from {what}", f"checkpoints grow by {size:.2g} MiB"])

    def _layers(self, pl_module: Any) -> dict[str, list[Tensor]]:
        """The parameters as they are now, as real tensors, by layer."""
        there, layers = dict(pl_module.named_parameters()), dict[str, list[Tensor]]()
        for name in self._shapes:
            *path, own = name.split(".")
            layer = ".".join(path[: self.layer_depth] or [own]) if self.layer_depth else ""
            tensor = there[name].detach()
            layers.setdefault(layer, []).append(torch.view_as_real(tensor) if tensor.is_complex() else tensor)
        return layers

    def _look(self, pl_module: Any, t: int) -> dict[str, float]:
        """What is seen after t steps."""
        layers = self._layers(pl_module)
        sketches = count_sketch(list(layers.values()), self._kept or SKETCH, self.seed)
        if self._kept:
            moved = torch.linalg.vector_norm(sketches - self._initial[0].to(sketches.device), dim=1).tolist()
        else:
            initial = iter(self._initial)
            moved = [math.hypot(*(_distance(each, next(initial)) for each in layer)) for layer in layers.values()]
        distance, whole = math.hypot(*moved), sketches.sum(0)
        values = {tags.WEIGHTS_DISTANCE: distance}
        if self.layer_depth:
            values |= dict(zip((f"{tags.WEIGHTS_DISTANCE}/{layer}" for layer in layers), moved, strict=True))
        before, *displacement = (each.to(whole.device) for each in self._last)
        self._last = [whole, whole - before]
        if displacement:
            values[tags.WEIGHTS_ANGLE] = angle(displacement[0].cpu(), self._last[1].cpu())
        if math.isfinite(distance):
            self._points.append([t, distance])
            if len(self._points) > HISTORY:
                self._points[: HISTORY // 2] = self._points[: HISTORY // 2 : 2]
        laws = self.latest
        values |= {
            tags.WEIGHTS_LOG_SLOPE: laws.slope,
            tags.WEIGHTS_LOG_R2: laws.log_r2,
            tags.WEIGHTS_POWER_EXPONENT: laws.exponent,
            tags.WEIGHTS_POWER_R2: laws.power_r2,
        }
        return finite(values)

    def state_dict(self) -> dict[str, Any]:
        """All that it has seen, and w_0 as it is kept."""
        return {"history": self.history, **{name: getattr(self, name) for name in _STATE}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved monitor stood, from its w_0, in its projection and its layers."""
        self.watch.history, self._done = list(state_dict["history"]), None
        for name in _STATE:
            setattr(self, name, copy(state_dict[name]))


_STATE = ("seed", "layer_depth", "_shapes", "_kept", "_initial", "_last", "_points", "_begun", "_due")


def _distance(tensor: Tensor, initial: Tensor) -> float:
    """Between two tensors, in float32 at least."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor.to(dtype) - initial.to(tensor.device, dtype)))
