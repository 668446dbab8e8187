"""The callback of the Hugging Face Trainer in real trainings, and in one of sentence-transformers' trainer."""

from __future__ import annotations

import pytest
import torch
from support.libraries import library
from support.temperature_callbacks import BATCH, STEPS, data, encoder, pairs, scheduled, source
from torch import nn

library("transformers")
library("accelerate")

import transformers  # noqa: E402

from fused_infonce.compat.transformers import TemperatureCallback  # noqa: E402
from fused_infonce.temperature import HeldOutTemperature  # noqa: E402


class Model(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.encoder, self.loss, self.used = encoder(), loss, []

    def forward(self, query, key):
        if self.training:
            self.used.append(float(self.loss.temperature))
        return {"loss": self.loss(self.encoder(query), self.encoder(key))}


class Reporter(transformers.TrainerCallback):
    """Keeps what is reported, as callbacks of TensorBoard and others do."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def trainer_of(loss, folder, reporter=None, **options):
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH // 2, gradient_accumulation_steps=2,
        logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, seed=3, save_strategy="steps", save_steps=3,
        **options,
    )  # fmt: skip
    rows = [{"query": q, "key": k} for q, k in zip(*data(), strict=True)]
    return transformers.Trainer(
        Model(loss), arguments, train_dataset=rows, callbacks=[] if reporter is None else [reporter]
    )


@pytest.mark.parametrize("kind", ["schedule", "held out", "loss"])
def test_it_sets_and_logs_the_temperature_and_goes_on_from_a_checkpoint(kind, tmp_path):
    given = (lambda model: pairs(model.encoder),) if kind == "held out" else ()
    (loss, stepper), reporter = source(kind), Reporter()
    trainer = trainer_of(loss, tmp_path, reporter)
    TemperatureCallback(stepper, *given).add_to(trainer)
    trainer.train()
    used = trainer.model.used
    assert used[::2] == used[1::2]  # batches that are accumulated
    assert len(used) == 2 * STEPS
    if kind == "schedule":
        assert used[::2] == pytest.approx(scheduled())
    elif kind == "held out":
        assert [x.step for x in stepper.history] == [0, 2, 4]
        assert used[::4] == [x.temperature for x in stepper.history]
    else:
        assert set(used) == {0.3}
    for logs in (trainer.state.log_history, reporter.logs):
        logs = [entry for entry in logs if "loss" in entry]
        assert [entry["temperature"] for entry in logs] == pytest.approx(used[::2])
        assert [entry["temperature/scale"] for entry in logs] == pytest.approx([1 / t for t in used[::2]])
        assert all(1 < entry["temperature/effective_negatives"] < BATCH // 2 for entry in logs)
        assert ("temperature/recall_at_1" in logs[-1]) == (kind == "held out")

    loss, stepper = source(kind)
    resumed = trainer_of(loss, tmp_path, restore_callback_states_from_checkpoint=True)
    TemperatureCallback(stepper, *given).add_to(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.model.used == pytest.approx(used[6:])


def test_among_the_callbacks_it_tells_the_history(tmp_path):
    loss, schedule = source("schedule")
    trainer = trainer_of(loss, tmp_path)
    trainer.add_callback(TemperatureCallback(schedule, name="contrast"))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["contrast"] for entry in logs] == pytest.approx(scheduled())


def test_it_follows_held_out_pairs_in_the_trainer_of_sentence_transformers(tmp_path):
    library("sentence_transformers")
    datasets = library("datasets")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    from examples.sentence_transformers_trainer import sentences, tiny_model
    from fused_infonce.compat import sentence_transformers as drop_in

    texts = sentences()
    torch.manual_seed(0)
    model = tiny_model([*texts["anchor"], *texts["positive"]])
    loss = drop_in.MultipleNegativesRankingLoss(model, scale=20.0)
    assert loss.temperature == 0.05
    follow = HeldOutTemperature(loss, every=2)
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=16, logging_steps=1, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", learning_rate=0.02,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(texts), loss=loss
    )

    def embedded(model):
        return tuple(model.encode(texts[name], convert_to_tensor=True) for name in ("anchor", "positive"))

    TemperatureCallback(follow, embedded).add_to(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, last = (x.temperature for x in follow.history)
    assert [entry["temperature"] for entry in logs] == pytest.approx([first, first, last, last])
    assert loss.scale == pytest.approx(1 / last)
    assert last != first
