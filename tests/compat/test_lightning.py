"""The callbacks of Lightning's two packages in real trainings, and resumed ones."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from support.libraries import library
from support.temperature_callbacks import BATCH, STEPS, data, encoder, pairs, scheduled, source
from torch.utils.data import DataLoader, TensorDataset

PACKAGES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
ACCUMULATED = 2


@pytest.fixture(params=PACKAGES, scope="module")
def package(request):
    """Return one of Lightning's packages and the callback for it."""
    found = library(PACKAGES[request.param])
    return found, importlib.import_module(f"fused_infonce.compat.{request.param}").TemperatureCallback


def training(lightning: Any, loss, callback, folder, steps, checkpoint=None):
    """Train, and return the temperatures that the loss was called with, the logs of all steps, and a checkpoint."""

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.loss, self.used = encoder(), loss, []

        def training_step(self, batch, index):
            self.used.append(float(self.loss.temperature))
            return self.loss(*(self.encoder(x) for x in batch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Logger(lightning.loggers.logger.Logger):
        name = version = "kept"

        def log_metrics(self, metrics, step=None):
            logs.append(metrics)

        def log_hyperparams(self, *args, **kwargs):
            """Keep none."""

    model, logs = Model(), []
    trainer = lightning.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=ACCUMULATED, callbacks=[callback], logger=Logger(),
        log_every_n_steps=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(*data()), BATCH // ACCUMULATED)
    trainer.fit(model, loader, ckpt_path=checkpoint)
    assert model.training
    path = folder / f"{steps}.ckpt"
    trainer.save_checkpoint(path)
    return model.used, [x for x in logs if "temperature" in x], path


@pytest.mark.parametrize("kind", ["schedule", "held out", "loss"])
def test_it_sets_and_logs_the_temperature_and_goes_on_from_a_checkpoint(package, kind, tmp_path):
    lightning, callback = package
    given = (lambda module: pairs(module.encoder),) if kind == "held out" else ()
    loss, stepper = source(kind)
    used, logs, _ = training(lightning, loss, callback(stepper, *given), tmp_path, STEPS)
    assert used[::2] == used[1::2]  # batches that are accumulated
    if kind == "schedule":
        assert used[::2] == pytest.approx(scheduled())
    elif kind == "held out":
        assert [x.step for x in stepper.history] == [0, 2, 4]
        assert used[::4] == [x.temperature for x in stepper.history]
        assert logs[-1]["temperature/fitted"] == pytest.approx(stepper.last.temperature)
        assert logs[-1]["temperature/recall_at_1"] == pytest.approx(stepper.last.recall.pessimistic)
    else:
        assert set(used) == {0.3}
    assert [x["temperature"] for x in logs] == pytest.approx(used[::2])
    assert all(1 < x["temperature/effective_negatives"] < BATCH // ACCUMULATED for x in logs)
    assert [x["temperature/scale"] for x in logs] == pytest.approx([1 / t for t in used[::2]])

    _, stepper = source(kind)
    *_, path = training(lightning, stepper if kind == "loss" else stepper.loss, callback(stepper, *given), tmp_path, 3)
    loss, stepper = source(kind)
    resumed, *_ = training(lightning, loss, callback(stepper, *given), tmp_path, STEPS, path)
    assert len(resumed) == 2 * (STEPS - 3)
    assert resumed[:2] == used[6:8]  # held-out pairs are not fitted again before it is due
    assert resumed == pytest.approx(used[6:], rel=0.05)  # dropout draws other numbers in a resumed training
    if kind == "schedule":
        assert resumed == pytest.approx(used[6:])


def test_states_of_two_losses_are_kept_apart(package):
    _, callback = package
    keys = {callback(source("loss")[1], name=name).state_key for name in ("image", "text")}
    assert len(keys) == 2
