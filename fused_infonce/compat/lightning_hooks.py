"""The hooks of a Lightning callback that sets and logs a temperature, for both of Lightning's packages."""

from __future__ import annotations

from typing import Any

from ..temperature.watching import Pairs, Watch


class TemperatureHooks:
    """Sets a loss's temperature before every step of the optimizer, and logs it at every batch.

    Logged are the temperature and its inverse, what was last fitted to held-out pairs, and of a loss made with
    record=True the effective negatives: see `Watch.figures`. A checkpoint has what a training needs to go on.

    Args:
        source: a loss, to log its temperature; or `HeldOutTemperature(loss)`, `CosineTemperature(loss, ...)` or another
            `TemperatureSchedule`, to set it too. One step of a schedule is one of the optimizer.
        pairs: for a `HeldOutTemperature`, a function of the LightningModule that returns embeddings of held-out pairs,
            (N, D) each. It is called where a fit is due, without gradients and in evaluation mode.
        name: of the temperature in the logs; the other figures are `name/scale` and so on.

    Raises:
        TypeError, ValueError: arguments, as of `Watch`.

    Example:
        >>> follow = HeldOutTemperature(loss, every=100)
        >>> callback = TemperatureCallback(follow, lambda module: (module(queries), module(keys)))
        >>> trainer = Trainer(callbacks=[callback])
    """

    def __init__(self, source: Any, pairs: Pairs | None = None, name: str = "temperature"):
        super().__init__()
        self.watch = Watch(source, pairs, name)

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint, of which there may be one for each loss."""
        return f"TemperatureCallback{{'name': {self.watch.name!r}}}"

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the temperature of a step."""
        self.watch.at(trainer.global_step, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the temperature of a batch."""
        pl_module.log_dict(self.watch.figures(), on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return self.watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.watch.load_state_dict(state_dict)
