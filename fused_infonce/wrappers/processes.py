"""What the wrappers of `torch.distributed` around an encoder need, so that its gradient is reduced once a step.

Nothing here imports or calls `torch.distributed` before a process group is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .chunks import tensors

BUCKET = 25 * 2**20  # bytes that one collective reduces, as DistributedDataParallel's default


def _there() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def module_of(model: Callable[..., Any]) -> nn.Module | None:
    """Return the module that a model is, or whose method it is, also where some arguments are already given."""
    while isinstance(model, partial):
        model = model.func
    owner = getattr(model, "__self__", model)
    return owner if isinstance(owner, nn.Module) else None


def given(model: Callable[..., Any]) -> Iterator[Tensor]:
    """Yield the tensors that a partial gives to a model, such as a prompt that is learned for a frozen one."""
    while isinstance(model, partial):
        for x in (*model.args, *model.keywords.values()):
            yield from x.parameters() if isinstance(x, nn.Module) else tensors(x)
        model = model.func


def without_replicas(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a DistributedDataParallel wraps.

    Its own forward broadcasts buffers, so that ranks with other numbers of chunks would wait for each other for ever.
    """
    if isinstance(model, partial):
        return partial(without_replicas(model.func), *model.args, **model.keywords)
    return model.module if isinstance(model, DistributedDataParallel) else model


def replicas(models: Iterable[Callable[..., Any]]) -> list[DistributedDataParallel]:
    """Return every DistributedDataParallel in the models, and the one in whose forward this is called, if any."""
    if not _there():
        return []
    found = [x for model in models for x in _modules(model) if isinstance(x, DistributedDataParallel)]
    active = DistributedDataParallel._active_ddp_module
    return list(dict.fromkeys(found if active is None else [*found, active]))


def _modules(model: Callable[..., Any]) -> Iterator[nn.Module]:
    module = module_of(model)
    return iter(()) if module is None else module.modules()


def shards(model: Callable[..., Any]) -> list[Any]:
    """Return the parameter groups of FSDP2 in a model, which hold the flags that say whether gradients are reduced."""
    if not _there():
        return []
    from torch.distributed.fsdp import FSDPModule

    groups: list[Any] = []
    for module in _modules(model):
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            own = getattr(state, "_fsdp_param_groups", None)  # older releases have one a module
            groups += [state._fsdp_param_group] if own is None else own
    return [group for group in groups if group is not None]


def agreed(model: Callable[..., Any], count: int) -> int:
    """Return the largest number of chunks of all ranks whose forward passes of this model talk to each other."""
    if not _there():
        return count
    from torch.distributed.tensor import DTensor

    module = module_of(model)
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    if inner is None:
        return count
    meshes = {x.device_mesh for x in inner.parameters() if isinstance(x, DTensor)}
    ranks = [(mesh.get_group(i), torch.device(mesh.device_type)) for mesh in meshes for i in range(mesh.ndim)]
    nested = (x for x in inner.modules() if isinstance(x, DistributedDataParallel))
    ranks += [(x.process_group, next(x.parameters()).device) for x in nested]
    for group, device in ranks:
        most = torch.tensor(count, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group)
        count = int(most.item())
    return count


@contextmanager
def unsynced(models: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Keep every DistributedDataParallel from reducing gradients that backward passes make inside."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model.no_sync())
        yield


def disarm(model: DistributedDataParallel, averaged: bool) -> None:
    """Keep the DistributedDataParallel in whose forward this is called from reducing in the backward that follows.

    It would take a parameter's first chunk for its whole gradient. Its flag is read when its forward ends.

    averaged: whether a backward through what that forward returns averages the gradients instead, as it must also where
    it does not come by the embeddings.
    """
    if model is not DistributedDataParallel._active_ddp_module or "_post_forward" in vars(model):
        return

    def restore() -> None:
        del model._pre_forward, model._post_forward

    def pre_forward(*inputs: Any, **options: Any) -> Any:
        restore()  # the forward before this one raised, and has not come to its end
        return model._pre_forward(*inputs, **options)

    def post_forward(output: Any) -> Any:
        restore()
        with model.no_sync():
            output = model._post_forward(output)
        model.require_forward_param_sync = True  # buffers are broadcast before the next forward, as ever
        for x in tensors(output) if averaged else ():
            if x.grad_fn is not None:
                x.register_hook(lambda _: average_later([model], None))
        return output

    model._pre_forward, model._post_forward = pre_forward, post_forward  # type: ignore[method-assign]


@contextmanager
def held_back(models: Sequence[Callable[..., Any]]) -> Iterator[Callable[[int], None]]:
    """Keep FSDP2 from reducing gradients, but in the last replay that a group of parameters takes part in.

    models: that of each replay. The function that this gives wants the number of a replay before it runs. The flags are
    then what they were, so that a user who accumulates gradients without reducing them goes on to do so.
    """
    groups = {id(model): shards(model) for model in models}
    last = {group: i for i, model in enumerate(models) for group in groups[id(model)]}
    flags = {group: (group.reduce_grads, group.all_reduce_grads) for group in last}

    def restore(replay: int | None) -> None:
        for group, was in flags.items():
            if replay is None or last[group] == replay:
                group.reduce_grads, group.all_reduce_grads = was

    for group in flags:
        group.reduce_grads = group.all_reduce_grads = False
    try:
        yield restore
    finally:
        restore(None)


_due: dict[DistributedDataParallel, Exception | None] = {}  # of the backward that runs, with what went wrong here


def average_later(models: Sequence[DistributedDataParallel], failure: Exception | None) -> None:
    """Average the gradients of models when the backward that runs has accumulated all of them; then raise `failure`."""
    for model in models:
        _due[model] = _due.get(model) or failure
    torch.autograd.Variable._execution_engine.queue_callback(_average_due)


def _average_due() -> None:
    models = list(_due.items())
    _due.clear()
    for model, failure in models:
        average(model, failure)


def average(model: DistributedDataParallel, failure: Exception | None = None) -> None:
    """Replace the gradients of a DistributedDataParallel by their means over its process group.

    A gradient that only some ranks have counts as zero on the others. As in its own reduction, what earlier backward
    passes have accumulated is averaged too: where they have reduced it already, it is the same on all ranks and stays.

    Raises:
        A rank's `failure` there, and RuntimeError on the others, so that none waits for one that has gone.
    """
    named = model.module.named_parameters()
    own = [x for name, x in named if x.requires_grad and name not in model.parameters_to_ignore]
    group, device = model.process_group, next(model.parameters()).device
    known = torch.tensor([*(x.grad is not None for x in own), failure is not None], device=device).int()
    torch.distributed.all_reduce(known, torch.distributed.ReduceOp.MAX, group)
    *used, failed = known.tolist()
    if failed:
        raise failure or RuntimeError("on another rank a replay failed: see that rank's error")
    for bucket in _buckets([x for x, there in zip(own, used, strict=True) if there]):
        _average(bucket, group)


def _average(bucket: Sequence[Tensor], group: Any) -> None:
    for x in bucket:
        if x.grad is None:
            x.grad = torch.zeros_like(x)
    gradients = [x.grad for x in bucket if x.grad is not None]
    flat = torch.cat([x.reshape(-1) for x in gradients])
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    torch.distributed.all_reduce(flat, group=group)
    flat /= torch.distributed.get_world_size(group)
    for x, mean in zip(gradients, flat.split([x.numel() for x in gradients]), strict=True):
        x.copy_(mean.view_as(x))


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield parameters of one dtype and device, a little more than BUCKET bytes at a time."""
    kinds: dict[Any, tuple[list[Tensor], int]] = {}
    for x in parameters:
        kind = x.dtype, x.device
        bucket, size = kinds.pop(kind, ([], 0))
        kinds[kind] = [*bucket, x], size + x.nbytes
        if size + x.nbytes >= BUCKET:
            yield kinds.pop(kind)[0]
    yield from (bucket for bucket, _ in kinds.values())
