"""A training with its temperature fixed, learned, or fitted to held-out pairs, and what its model is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fused_infonce import FusedInfoNCELoss
from fused_infonce.temperature import HeldOutTemperature, fit, sweep

from .rules import BOUNDS, RULES
from .task import Task, embedded

Kind = Literal["fixed", "held out", "learned", "rule"]
DEFAULTS = (0.5, 0.1, 0.07, 0.05, 0.02)
LEARNED_FROM = 0.07  # as CLIP
MAX_LOGIT_SCALE = 100.0
# The encoder's learning rate, which CLIP gives its scale too, would move it by a tenth in as few steps as these.
SCALE_LEARNING_RATE = 0.05
EVERY = 5  # steps from one fit to the next


@dataclass(frozen=True)
class Policy:
    """What a training's temperature does, from where; None: from a fit before the first step. rule: one of RULES."""

    kind: Kind
    start: float | None
    rule: str = ""

    def __str__(self) -> str:
        if self.rule:
            return f"rule: {self.rule}"
        if self.start is None:
            return f"{self.kind}, fitted first"
        return f"{self.kind} from {self.start:g}" if self.kind != "fixed" else f"fixed at {self.start:g}"


POLICIES = (
    *(Policy("held out", start) for start in (None, 1.0, 0.1, 0.02)),
    *(Policy("fixed", start) for start in DEFAULTS),
    Policy("learned", LEARNED_FROM),
    *(Policy("rule", LEARNED_FROM, rule) for rule in RULES),
)


@dataclass(frozen=True)
class Run:
    """A training's temperature, and its model on test pairs.

    temperature: at the end; history: after every step. recall_at_1, nll, ece: of the test pairs, the latter two at
    this temperature. fitted: what `fit` finds of the pairs for fitting after the training; fitted_nll and fitted_ece:
    of the test pairs at it. default_nll: at each of the famous temperatures.
    """

    temperature: float
    recall_at_1: float
    nll: float
    ece: float
    fitted: float
    fitted_nll: float
    fitted_ece: float
    default_nll: dict[str, float]
    history: list[float]


def train(task: Task, policy: Policy, seed: int, tick: Callable[[], object]) -> Run:
    """Trains a fresh model; the seed gives its weights and the order of the pairs, whatever the temperature does."""
    torch.manual_seed(seed)
    model = task.model().train()
    start = 1.0 if policy.start is None else policy.start
    learns = policy.kind == "learned"
    loss = FusedInfoNCELoss(start, learnable_temperature=learns, max_logit_scale=MAX_LOGIT_SCALE if learns else None)
    follow = HeldOutTemperature(loss, every=EVERY, bounds=BOUNDS) if policy.kind == "held out" else None
    groups = [{"params": list(model.parameters())}]
    rates = [task.learning_rate]
    if learns:
        groups.append({"params": list(loss.parameters())})
        rates.append(SCALE_LEARNING_RATE)
    optimizer = torch.optim.AdamW(groups, lr=task.learning_rate, weight_decay=0.0)
    total = task.steps + 3  # of fewer than two steps up, or fewer than one down, the schedule would divide by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=total, pct_start=max(0.1, 2 / total))
    history: list[float] = []
    for _ in range(task.epochs):
        order = task.train[torch.randperm(len(task.train))]
        for chosen in order[: len(order) // task.batch * task.batch].split(task.batch):
            if follow is not None and policy.start is None:
                follow.step(lambda: embedded(task, model, task.fitting))
            query, key = task.embed(model, chosen)
            if policy.rule:
                loss.temperature = RULES[policy.rule](query.detach(), key.detach(), history[-1] if history else start)
            value = loss(query, key)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            if learns:
                loss.clamp_logit_scale_()
            if follow is not None and policy.start is not None:
                follow.step(lambda: embedded(task, model, task.fitting))
            t = loss.temperature
            history.append(t.item() if isinstance(t, Tensor) else t)
            tick()
    return evaluated(task, model, history)


def evaluated(task: Task, model: nn.Module, history: list[float]) -> Run:
    """Measures a trained model on the test pairs."""
    found = fit(*embedded(task, model, task.fitting), bounds=BOUNDS)
    of_test = sweep(*embedded(task, model, task.test), BOUNDS)
    t = history[-1]
    return Run(
        t, of_test.recall(1).pessimistic, of_test.nll(t).item(), of_test.calibration(t).ece, found.temperature,
        of_test.nll(found.temperature).item(), of_test.calibration(found.temperature).ece,
        {f"{default:g}": of_test.nll(default).item() for default in DEFAULTS}, history,
    )  # fmt: skip
