"""The registry of backends, the choice of one for a call, and the plan by which it runs."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .contract import LN2, Backend, Problem
from .device import facts
from .plan import Plan, choose
from .precision import EXPONENT_ROOM, accumulator, product_dtype
from .recording import recordings

BackendName = Literal["auto", "triton", "torch", "reference"]
Reduction = Literal["mean", "sum", "none"]


class Options(NamedTuple):
    """The options of a call beyond its tensors."""

    backend: BackendName = "auto"
    workspace_limit: int | None = None
    reduction: Reduction = "mean"
    call: Any = None  # the `distributed.Call` of a call over several processes, of which this floor knows nothing

    def limit(self, device: torch.device) -> int:
        """Return the bytes of workspace on a device: the call's, or the environment's, or else the device's own."""
        return self.workspace_limit or facts(device).limit


def load(name: str) -> Backend:
    """Return the module of this name, a folder or file beside this one."""
    backend: Any = import_module(f".{name}", __package__)
    return backend


_LOADED: dict[str, Backend] = {}


def get(name: str) -> Backend:
    """Return the backend of this name; while `torch.compile` records, one that is called through operators."""
    if torch.compiler.is_compiling():
        if name == "reference":  # the compiler looks inside
            from . import reference

            return cast(Backend, reference)
        from .operators import Recorded

        return Recorded(name)
    if name not in _LOADED:
        _LOADED[name] = load(name)
    return _LOADED[name]


_UNAVAILABLE: dict[tuple[torch.device, torch.dtype], str] = {}


def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Return why the Triton backend cannot run on such tensors, or "" if it can."""
    if (device, dtype) not in _UNAVAILABLE:
        _UNAVAILABLE[device, dtype] = _unavailable(torch.empty(0, dtype=dtype, device=device))
    return _UNAVAILABLE[device, dtype]


# What torch.compiler.assume_constant_result sets. To call it would import torch._dynamo, as long as all of torch again.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unavailable(tensor: Tensor) -> str:
    try:
        return load("triton").unavailable(tensor)
    except ImportError as error:
        if (error.name or "").endswith(".kernels"):
            return (
                f"the source tree {Path(__file__).parents[2]} hides the installed package, and lacks the kernels that "
                "an installation has: start Python in another folder"
            )
        return f"Triton cannot be imported ({error})"


def resolve(backend: str, tensor: Tensor) -> str:
    """Return the name of the backend that runs: "auto" is Triton on a GPU where it can run, PyTorch elsewhere."""
    if backend == "auto" and not tensor.is_cuda:
        return "torch"
    if backend not in ("auto", "triton"):
        return backend
    why = unavailable(tensor.device, tensor.dtype)
    if why and backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run here: {why}")
    if why and not torch.compiler.is_compiling():
        warnings.warn(f"backend='auto' runs in PyTorch, slower: {why}", stacklevel=user_level())
    return "torch" if why else "triton"


def user_level(*packages: str) -> int:
    """Return the `stacklevel` with which a warning of the caller points at the line of the user's code.

    packages: names of further packages, between the user and the caller, whose lines are passed over.
    """
    folders = [Path(__file__).parents[1], Path(torch.__file__).parent]
    folders += [Path(x) for name in packages for x in getattr(sys.modules.get(name), "__path__", ())]
    inside = tuple(f"{folder}{os.sep}" for folder in folders)
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level


remembered: dict[tuple[Any, ...], Plan] = {}  # plans by all that they depend on
MOST_PLANS = 1024


def plan_of(
    problem: Problem, options: Options, reduced: bool, weighted: bool = False, full: bool = False,
    bias: Tensor | None = None,
) -> Plan:  # fmt: skip
    """Return the plan of a call on these inputs as they are now, before they are cast.

    reduced, weighted: whether the loss is a sum of row losses known in closed form, and whether rows weigh differently.
    full: whether the statistics themselves are what was asked for. bias: that of a loss of sigmoids.
    """
    query, t = problem.query.rows, problem.temperature
    device = query.device
    known = facts(device)
    backend = resolve(options.backend, query)
    compiling = torch.compiler.is_compiling()
    leaves: Sequence[Tensor] = problem.leaves
    if problem.added or bias is not None:
        leaves = (*leaves, *problem.added, *(() if bias is None else (bias,)))
    if backend != "reference":
        if forward_ad._current_level >= 0:
            _refuse_tangents(*leaves, t.values)
        if not compiling and torch._C._are_functorch_transforms_active():
            raise RuntimeError("the transforms of torch.func (grad, jacrev, vmap, ...) need backend='reference'")
    of_t = gradients = of_biases = False
    if torch.is_grad_enabled():
        of_t = gradients = t.given is not None and t.given.requires_grad
        for x in leaves:
            gradients = gradients or x.requires_grad
        if problem.biases:
            for place, x in zip(problem.biased, problem.biases, strict=True):
                of_biases = of_biases or (x.requires_grad and not problem.sets[place].is_paired())
    dtype, as_is = query.dtype, not problem.handles
    if torch.is_autocast_enabled(known.type):
        dtype, as_is = product_dtype(query), False
    for x in problem.inputs:
        as_is = as_is and x.dtype == dtype
    room, of_scores = EXPONENT_ROOM[dtype] * LN2, problem.score_bound
    of_logits = problem.logit_bound if problem.added else of_scores
    asked = (
        backend, device, dtype, as_is, options.workspace_limit or known.limit, reduced, weighted, full,
        bias is not None, recordings.wanted, of_t, gradients, of_biases, of_logits <= room,
        of_scores <= room,
    )  # fmt: skip
    if compiling:
        problem.tensors()  # those that are made where they are asked for: a Function may not make them inside
        return _chosen(problem, *asked)
    key = (*asked, problem.shape)
    plan = remembered.get(key)
    if plan is None:
        plan = _chosen(problem, *asked)
        if torch._C._is_tracing():  # the sizes in the key are tensors
            return plan
        if len(remembered) >= MOST_PLANS:
            remembered.clear()
        remembered[key] = plan
    return plan


def _chosen(
    problem: Problem, backend: str, device: torch.device, dtype: torch.dtype, as_is: bool, limit: int, reduced: bool,
    weighted: bool, full: bool, pairwise: bool, record: bool, of_t: bool, gradients: bool, of_biases: bool,
    bounded: bool, scores_bounded: bool,
) -> Plan:  # fmt: skip
    """Return the plan of a problem, of which it depends on the shape alone."""
    n, d = problem.query.rows.shape
    m = sum(keys.columns() for keys in (problem.keys if problem.in_batch else problem.keys[1:]))
    return choose(
        backend=backend, device=device.type, n=n, m=m, d=d, itemsize=dtype.itemsize,
        acc_itemsize=accumulator(dtype).itemsize, gradients=gradients, columns=problem.columns,
        self_similar=problem.self_similar, reduced=reduced, one_to_one=problem.one_to_one,
        plain=problem.plain and not weighted, per_row=not problem.temperature.is_shared(),
        biased=len(problem.biases) > 0, learned_biases=of_biases, bounded=bounded, scores_bounded=scores_bounded,
        guided=problem.ceiling is not None, limit=limit, full=full, mean=full or of_t or record, record=record,
        as_is=as_is, pairs=problem.normalize and not problem.added, joint=problem.joint, pairwise=pairwise,
        processors=facts(device).processors if backend == "triton" else 0,
    )  # fmt: skip


def _refuse_tangents(*tensors: Tensor) -> None:
    for x in tensors:
        if forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError("the fused loss has no forward-mode derivative (jvp): it needs backend='reference'")
