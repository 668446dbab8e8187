"""A temperature in state dicts of this version and the last, in copies and pickles, in other dtypes, and sharded."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from support.helpers import two
from support.losses import LOSSES
from torch import nn
from torch.distributed.fsdp import fully_shard

from fused_infonce import (
    FusedInfoNCELoss,
    MatryoshkaLoss,
    MoCoLoss,
    info_nce,
)

every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


class Holder(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self):
        return self.value


class Model(nn.Module):
    """What a user trains: a tower and a loss in it."""

    def __init__(self, loss):
        super().__init__()
        self.tower, self.loss = nn.Linear(4, 4), loss


def own_keys(module):
    return [name for name in module.state_dict() if "queue" not in name and name != "log_u"]


@every_loss
def test_one_key_in_every_state_dict(make):
    loss = make(temperature=0.25, learnable_temperature=True)
    assert own_keys(loss) == [name for name, _ in loss.named_parameters()] == ["logit_scale"]
    assert loss.logit_scale.shape == (1,)
    assert loss.logit_scale.dtype == torch.float32
    assert loss.logit_scale.item() == pytest.approx(math.log(4))
    assert own_keys(make(temperature=0.1)) == own_keys(make(temperature=torch.tensor(0.1))) == []
    assert own_keys(make(temperature=nn.Parameter(torch.tensor(0.1)))) == ["temperature"]
    assert own_keys(make(temperature=Holder(0.1))) == ["temperature.value"]
    again = make(temperature=0.5, learnable_temperature=True)
    assert str(again.load_state_dict(loss.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(again.temperature, loss.temperature)


def test_the_scale_is_float32_whatever_the_default_dtype():
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            loss = FusedInfoNCELoss(0.07, learnable_temperature=True)
            assert loss.logit_scale.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("assign", [False, True])
@every_loss
def test_a_scale_of_no_dimensions_of_version_0_1_loads(make, assign):
    for wrap, prefix in ((lambda x: x, ""), (Model, "loss."), (lambda x: Model(Model(x)), "loss.loss.")):
        model = wrap(make(temperature=0.5, learnable_temperature=True))
        state = model.state_dict() | {prefix + "logit_scale": torch.tensor(3.0)}
        model.load_state_dict(state, strict=True, assign=assign)
        scale = model.get_parameter(prefix + "logit_scale")
        assert (scale.shape, scale.tolist(), scale.requires_grad) == ((1,), [3.0], True)
        assert state[prefix + "logit_scale"].dim() == 0  # the user's dictionary is left alone


@pytest.mark.parametrize("assign", [False, True])
@every_loss
def test_a_parameter_saved_by_version_0_1_loads(make, assign):
    """FusedInfoNCELoss saved it as "_temperature", the other losses as "temperature"."""
    for wrap, prefix in ((lambda x: x, ""), (Model, "loss.")):
        for name in ("_temperature", "temperature"):
            model = wrap(make(temperature=nn.Parameter(torch.tensor(0.5))))
            state = model.state_dict()
            del state[prefix + "temperature"]
            state[prefix + name] = torch.tensor(0.125)
            model.load_state_dict(state, strict=True, assign=assign)
            loss = model.get_submodule(prefix.rstrip("."))
            assert loss.temperature.item() == 0.125
            assert isinstance(loss.temperature, nn.Parameter)
            assert list(state)[-1] == prefix + name


def test_unlike_keys_are_still_refused():
    learned, fixed = FusedInfoNCELoss(learnable_temperature=True), FusedInfoNCELoss()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*logit_scale"):
        fixed.load_state_dict(learned.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*logit_scale"):
        learned.load_state_dict(fixed.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for logit_scale"):
        learned.load_state_dict({"logit_scale": torch.ones(2)})


def test_matryoshka_holds_the_scale_of_its_loss():
    loss = MatryoshkaLoss(FusedInfoNCELoss(0.5, learnable_temperature=True), [4, 2])
    assert list(loss.state_dict()) == ["loss.logit_scale"]
    loss.load_state_dict({"loss.logit_scale": torch.tensor(3.0)})
    assert loss.loss.logit_scale.tolist() == [3.0]  # type: ignore[attr-defined]


HELD = {
    "number": lambda: {"temperature": 0.2},
    "tensor": lambda: {"temperature": torch.tensor(0.2)},
    "rows": lambda: {"temperature": torch.linspace(0.1, 0.2, 6)},
    "parameter": lambda: {"temperature": nn.Parameter(torch.tensor(0.2))},
    "module": lambda: {"temperature": Holder(0.2)},
    "learnable": lambda: {"temperature": 0.2, "learnable_temperature": True, "max_logit_scale": 50},
}


def saved(loss):
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved], ids=["deepcopy", "pickle", "torch.save"]
)
def test_a_copy_has_a_temperature_of_its_own(held, again):
    query, key = two()
    loss = FusedInfoNCELoss(**HELD[held]())
    value = loss(query, key)
    if value.requires_grad:
        value.backward()  # a copy is also made in the midst of training
    twin = again(loss)
    assert repr(twin) == repr(loss)
    assert torch.equal(twin(query, key), value)
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in loss.named_parameters()]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in loss.parameters()}
    twin.temperature = 0.7
    assert torch.equal(loss(query, key), value)
    torch.testing.assert_close(twin(query, key), info_nce(query, key, temperature=0.7), rtol=1e-6, atol=0)


def test_a_callable_is_shared_by_copies():
    scale = nn.Parameter(torch.tensor([1.0]))
    loss = FusedInfoNCELoss(lambda: torch.exp(-scale))
    loss(*two()).backward()
    copy.deepcopy(loss)(*two()).backward()
    assert scale.grad.ne(0)


@pytest.mark.parametrize("held", HELD)
def test_other_dtypes_keep_what_parameters_are_there(held):
    query, key = two()
    loss = FusedInfoNCELoss(**HELD[held]())
    before = loss(query, key)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        loss = loss.to(dtype)
        assert all(p.dtype == dtype for p in loss.parameters())
        # bfloat16 rounds logit_scale by 2^-9 of its value, and so the temperature, and float32 inherits what it left
        rounding = 1e-6 if dtype == torch.float64 else 3e-2
        torch.testing.assert_close(loss(query, key), before, rtol=rounding, atol=0)
        loss = loss.to("cpu")
    assert loss.double() is loss
    frozen = loss.requires_grad_(False)
    assert not frozen(query, key).requires_grad


def test_an_optimizer_finds_the_scale_by_its_name():
    """Weight decay would pull the temperature towards 1: the scale is put apart."""
    model = Model(FusedInfoNCELoss(0.1, learnable_temperature=True))
    apart = [p for name, p in model.named_parameters() if name.endswith("logit_scale")]
    others = [p for name, p in model.named_parameters() if not name.endswith("logit_scale")]
    optimizer = torch.optim.AdamW(
        [{"params": apart, "weight_decay": 0.0}, {"params": others, "weight_decay": 10.0}], lr=0.01
    )
    before = model.loss.logit_scale.item()
    query, key = (x.float() for x in two())
    model.loss(model.tower(query), key).backward()
    model.loss.logit_scale.grad.zero_()
    optimizer.step()
    assert model.loss.logit_scale.item() == before
    model.loss.temperature = 0.2  # goes on from there, the same parameter
    assert apart[0] is model.loss.logit_scale
    assert apart[0].item() == pytest.approx(math.log(5))


@every_loss
def test_from_the_meta_device_it_starts_where_it_would_have(make):
    """As FSDP2 makes a model: without memory, then with it, and each module resets what is its own."""
    for start in (0.25, torch.tensor(0.25)):
        with torch.device("meta"):
            loss = make(temperature=start, learnable_temperature=True)
        for module in loss.to_empty(device="cpu").modules():
            module.reset_parameters()
        assert loss.temperature.item() == pytest.approx(0.25)
        if isinstance(loss, MoCoLoss):
            torch.testing.assert_close(loss.queue.norm(dim=0), torch.ones(3))
            assert loss.queue_ptr.tolist() == [0]
            assert loss.queue.T.is_contiguous()


def test_on_the_meta_device_it_shows_and_starts_afterwards():
    with torch.device("meta"):
        loss = FusedInfoNCELoss(0.1, learnable_temperature=True)
    assert "learnable_temperature=True" in repr(loss)
    loss = loss.to_empty(device="cpu")
    loss.temperature = 0.1
    assert loss.temperature.item() == pytest.approx(0.1)  # type: ignore[attr-defined, union-attr]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("held", ["learnable", "parameter"])
def test_it_is_sharded_by_fsdp2(held):
    """FSDP2 refuses parameters of no dimensions, and puts its own in their place by assignment."""
    options = {"learnable": HELD["learnable"], "parameter": lambda: {"temperature": nn.Parameter(torch.tensor([0.2]))}}
    query, key = torch.randn(2, 6, 4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        losses = [FusedInfoNCELoss(**options[held]()) for _ in range(2)]
        fully_shard(losses[1], mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        values = []
        for loss in losses:
            optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
            for _ in range(3):
                value = loss(query, key)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                if held == "learnable":
                    loss.clamp_logit_scale_()
            values.append(value.detach())
        assert torch.equal(*values)
        sharded = losses[1]
        assert list(sharded.state_dict()) == ["logit_scale" if held == "learnable" else "temperature"]
        assert "temperature" in repr(sharded)
        if held == "learnable":
            sharded.temperature = 0.5
            assert sharded.logit_scale.full_tensor().item() == pytest.approx(math.log(2))
    finally:
        dist.destroy_process_group()
