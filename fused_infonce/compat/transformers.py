"""A callback of the Hugging Face Trainer that sets the temperature of a loss and logs it.

It serves the trainers that are derived from it too, such as sentence-transformers'.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..temperature.watching import Pairs, Watch

__all__ = ["TemperatureCallback"]


class TemperatureCallback(TrainerCallback):
    """Sets a loss's temperature before every step of the optimizer, and logs it where the trainer logs its loss.

    Logged are the temperature and its inverse, what was last fitted to held-out pairs, and of a loss made with
    record=True the effective negatives: see `Watch.figures`. A checkpoint has what a training needs to go on.

    Args:
        source: a loss, to log its temperature; or `HeldOutTemperature(loss)`, `CosineTemperature(loss, ...)` or another
            `TemperatureSchedule`, to set it too. One step of a schedule is one of the optimizer. Of losses that others
            wrap, such as `MatryoshkaLoss`, the inner one.
        pairs: for a `HeldOutTemperature`, a function of the model that returns embeddings of held-out pairs, (N, D)
            each. It is called where a fit is due, without gradients and in evaluation mode.
        name: of the temperature in the logs; the other figures are `name/scale` and so on.

    Raises:
        TypeError, ValueError: arguments, as of `Watch`.

    Example:
        >>> follow = HeldOutTemperature(loss, every=100)
        >>> callback = TemperatureCallback(follow, lambda model: (embed(model, queries), embed(model, keys)))
        >>> trainer = Trainer(model, arguments, callbacks=[callback])
    """

    def __init__(self, source: Any, pairs: Pairs | None = None, name: str = "temperature"):
        super().__init__()
        self.watch = Watch(source, pairs, name)

    def add_to(self, trainer: Any) -> TemperatureCallback:
        """Add this callback to a trainer before those that report, and return it.

        With `callbacks=[...]` it comes after them: its figures are then in the trainer's history and in what is
        printed, and not in TensorBoard, Weights & Biases and the like.
        """
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())
        return self

    @property
    def key(self) -> str:
        """The name of this callback's state in a checkpoint, of which there may be one for each loss."""
        return f"fused_infonce TemperatureCallback {self.watch.name}"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from a checkpoint where the trainer does."""
        if self.key in state.stateful_callbacks:
            self.watch.load_state_dict(state.stateful_callbacks[self.key]["attributes"])

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Set the temperature of a step."""
        assert model is not None
        self.watch.at(state.global_step, model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put what a checkpoint is to keep where the trainer writes it from, as JSON."""
        state.stateful_callbacks[self.key] = {"args": {}, "attributes": without_tensors(self.watch.state_dict())}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the figures to those of a training step."""
        if logs is not None and "loss" in logs:
            figures = {name: value.item() for name, value in self.watch.figures().items()}
            logs.update(figures)
            state.log_history[-1].update(figures)


def without_tensors(state: Any) -> Any:
    """Return nested dictionaries with the values of tensors, each of one element, in their place."""
    if isinstance(state, dict):
        return {name: without_tensors(value) for name, value in state.items()}
    return state.item() if isinstance(state, Tensor) else state
