"""One framework's snippet of docs/distributed.md in a training of a few steps, to be run by torchrun or in one process.

    python -m torch.distributed.run --nproc-per-node 2 frameworks.py Lightning folder

Every process trains on its share of the same pairs; the first writes the encoder's weights before and after to a file
in the folder. Without torchrun there is one process, whose batches hold all pairs and whose loss asks for no others.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
PAIRS, D, EPOCHS = 8, 6, 3
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


@dataclass
class Output:
    """What models of the Hugging Face libraries return, as far as it is used here."""

    pooler_output: Tensor
    last_hidden_state: Tensor


class Encoder(nn.Module):
    """An encoder that returns an `Output`, and of which FSDP2 shards the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])

    def embedded(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x

    def forward(self, x: Tensor) -> Any:
        found = self.embedded(x)
        return Output(found, found[:, None])


class Plain(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        return self.embedded(x)


def snippet(framework: str) -> str:
    """Return the code that the page gives for a framework."""
    code = PAGE.read_text(encoding="utf-8").split(f"**{framework}.**")[1].split("```py\n")[1].partition("```")[0]
    return code if WORLD > 1 else code.replace(", distributed=True", "")


def pairs(nested: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(2, D, generator=generator) for _ in range(PAIRS)]
    return [{"query": {"x": q} if nested else q, "passage": {"x": p} if nested else p} for q, p in rows]


def fsdp2(names: dict[str, Any]) -> nn.Module:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Plain()
    if WORLD > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (WORLD,))
        names["fully_shard"] = lambda module: fully_shard(module, mesh=mesh)
    else:
        names["fully_shard"] = lambda module: module
    rank = dist.get_rank() if WORLD > 1 else 0
    rows = torch.stack([torch.stack([x["query"], x["passage"]]) for x in pairs(False)]).chunk(WORLD)[rank]
    names.update(model=model, queries=rows[:, 0], passages=rows[:, 1])
    head, _, last = snippet("FSDP2").rpartition("value = ")
    exec(head, names)
    optimizer = torch.optim.SGD([*model.parameters(), *names["loss"].parameters()], lr=0.1)
    for _ in range(EPOCHS):
        exec(f"value = {last}", names)
        optimizer.zero_grad()
        names["value"].backward()
        optimizer.step()
    return model


def lightning(names: dict[str, Any]) -> nn.Module:
    from lightning import LightningModule, Trainer

    names["LightningModule"] = LightningModule
    exec(snippet("Lightning"), names)
    model = names["Retriever"](Plain())
    strategy = "ddp" if WORLD > 1 else "auto"
    trainer = Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy, max_epochs=EPOCHS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(pairs(False), batch_size=PAIRS // WORLD))
    return model.encoder


def accelerate(names: dict[str, Any]) -> nn.Module:
    from accelerate import Accelerator

    model = Encoder()
    names.update(
        Accelerator=lambda: Accelerator(cpu=True), model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loader=DataLoader(pairs(True) * EPOCHS, batch_size=PAIRS // WORLD),
    )  # fmt: skip
    exec(snippet("Accelerate"), names)
    return model


def trainer(names: dict[str, Any]) -> nn.Module:
    from transformers import Trainer, TrainingArguments

    names["Trainer"] = Trainer
    exec(snippet("HF Trainer"), names)
    arguments = TrainingArguments(
        sys.argv[2], num_train_epochs=EPOCHS, per_device_train_batch_size=PAIRS // WORLD, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no", remove_unused_columns=False, learning_rate=1e-3,
    )  # fmt: skip
    model = Encoder()
    names["RetrieverTrainer"](model, arguments, default_collate, train_dataset=pairs(True)).train()
    return model


FRAMEWORKS = {"FSDP2": fsdp2, "Lightning": lightning, "Accelerate": accelerate, "HF Trainer": trainer}


def main() -> None:
    import fused_infonce

    torch.manual_seed(0)
    before = Encoder().state_dict()
    torch.manual_seed(0)
    names = {"torch": torch, "FusedInfoNCELoss": fused_infonce.FusedInfoNCELoss}
    model = FRAMEWORKS[sys.argv[1]](names)
    after = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in model.state_dict().items()}
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save((before, after), Path(sys.argv[2]) / str(WORLD))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
