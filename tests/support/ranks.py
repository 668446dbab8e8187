"""A call of a loss over simulated ranks, and the same call of one process on the rows of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_infonce.distributed import Distributed
from fused_infonce.distributed.loopback import Loopback, LoopbackCommunicator


class Echo:
    """Rank 0 of W ranks that all have what it has, so that no other thread allocates."""

    def __init__(self, world: int):
        self.rank, self.world = 0, world

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        found = torch.cat([x] * self.world)
        return lambda: found

    def reduce_scatter(self, x: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        found = x[: counts[0]] * self.world
        return lambda: found

    def all_to_all(self, x: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        found = torch.stack([x[: counts[0]]] * self.world)
        return lambda: found

    def all_gather_host(self, message: Tensor) -> Tensor:
        return torch.stack([message] * self.world)


class Input(NamedTuple):
    """One tensor that a call is given.

    make: draws a rank's tensor from its number of samples. dim: the dimension along which the tensors of the ranks
    follow one another; None: all ranks have the same. views: of how many parts that dimension is made, each of which is
    joined by itself. of: the input that integers are places in, which a later rank's are shifted by. grad: whether it
    gets a gradient
    """

    make: Callable[[int], Tensor]
    dim: int | None = 0
    views: int = 1
    of: str = ""
    grad: bool = True


@dataclass(frozen=True)
class Case:
    """A loss with some of its options.

    inputs: its tensors by name. temperatures: the kinds that it takes. scale: the name of the argument that is one.
    views: how many values "none" returns for a sample. reductions: those that it has. adapt: makes its arguments of the
    tensors, where they are not its arguments already
    """

    function: Callable[..., Tensor]
    inputs: dict[str, Input]
    options: dict[str, Any] = field(default_factory=dict)
    temperatures: Sequence[str] = ("number", "shared", "rows", "column")
    scale: str = "temperature"
    views: int = 1
    reductions: Sequence[str] = ("mean", "sum", "none")
    adapt: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def with_temperature(self, kind: str, lowest: float = 0.1) -> Case:
        """Return the case with a temperature, or a scale, of this kind among its inputs or options."""
        scaled = self.scale != "temperature"

        def values(*shape: int) -> Tensor:
            t = lowest + 0.3 * torch.rand(shape, dtype=torch.float64)
            return 1 / t if scaled else t

        drawn = {
            "number": None,
            "shared": Input(lambda _: values(1), None),
            "rows": Input(lambda n: values(self.views * n), 0, self.views),
            "column": Input(lambda n: values(n, 1)),
        }[kind]
        if drawn is None:
            number = values().item()
            return replace(self, options={**self.options, self.scale: number})
        return replace(self, inputs={**self.inputs, self.scale: drawn})


class Outcome(NamedTuple):
    """What a call returns, and the gradients of its inputs."""

    value: Tensor
    gradients: dict[str, Tensor]


def drawn(case: Case, counts: Sequence[int], dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Return the inputs of each rank, which has so many samples."""
    shared = {name: kind.make(0) for name, kind in case.inputs.items() if kind.dim is None}
    parts = [{name: shared.get(name, kind.make(n)) for name, kind in case.inputs.items()} for n in counts]
    return [{name: x.to(dtype) if x.is_floating_point() else x for name, x in part.items()} for part in parts]


def joined(case: Case, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the inputs of one process that has the rows of all ranks."""
    found = {}
    for name, kind in case.inputs.items():
        tensors = [part[name] for part in parts]
        if kind.of:
            sizes = [part[kind.of].shape[0] for part in parts]
            tensors = [torch.where(x < 0, x, x + sum(sizes[:rank])) for rank, x in enumerate(tensors)]
        found[name] = tensors[0] if kind.dim is None else one_after_another(tensors, kind.dim, kind.views)
    return found


def one_after_another(tensors: Sequence[Tensor], dim: int = 0, views: int = 1) -> Tensor:
    """Return tensors one after another along a dimension, of which each of `views` equal parts is joined by itself."""
    apart = [x.unflatten(dim, (views, x.shape[dim] // views)) for x in tensors]
    return torch.cat(apart, dim + 1).flatten(dim, dim + 1)


def outcome(case: Case, given: dict[str, Tensor], upstream: Tensor | None, **options: Any) -> Outcome:
    """Return the value of a call and its inputs' gradients; upstream: the value's gradient, None: 1.5."""
    kinds = case.inputs
    leaves = {name: x.clone() for name, x in given.items()}
    needed = {name: x.requires_grad_() for name, x in leaves.items() if kinds[name].grad and x.is_floating_point()}
    value = case.function(**case.adapt(leaves), **case.options, **options)
    value.backward(torch.full_like(value, 1.5) if upstream is None else upstream.to(value.dtype))
    return Outcome(
        value.detach(), {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in needed.items()}
    )


def of_ranks(
    case: Case, parts: Sequence[dict[str, Tensor]], upstream: Sequence[Tensor] | None = None, *,
    parameter_gradients: str = "mean", timeout: float = 20, **options: Any,
) -> list[Outcome]:  # fmt: skip
    """Return what every simulated rank finds that calls with its own inputs."""

    def work(communicator: LoopbackCommunicator) -> Outcome:
        rank = communicator.rank
        distributed = Distributed(communicator, parameter_gradients=parameter_gradients)
        return outcome(
            case, parts[rank], None if upstream is None else upstream[rank], distributed=distributed, **options
        )

    return succeeded(Loopback(len(parts), timeout).run(work))


def succeeded(found: Sequence[Any]) -> list[Any]:
    """Return what the ranks found, or raise the error of the first that is not about another rank's."""
    errors = [x for x in found if isinstance(x, BaseException)]
    for error in sorted(errors, key=lambda x: type(x).__name__ in ("BrokenBarrierError", "RuntimeError")):
        raise error
    return list(found)


def gathered(case: Case, found: Sequence[Outcome], reduction: str, factor: int) -> Outcome:
    """Return the outcome of one process that those of the ranks stand for, having checked what they must agree in.

    factor: by how much gradients of inputs are multiplied. Where it is not 1, those that ranks share are whole.
    """
    if reduction == "none":
        value = one_after_another([x.value for x in found], views=case.views)
    else:
        value = found[0].value
        assert all(same(x.value, value) for x in found), [x.value for x in found]
    gradients = {}
    for name in found[0].gradients:
        kind, each = case.inputs[name], [x.gradients[name] for x in found]
        if kind.dim is not None:
            gradients[name] = one_after_another(each, kind.dim, kind.views) / factor
        elif factor == 1 < len(found):
            gradients[name] = torch.stack(each).sum(0)
        else:
            assert all(same(x, each[0]) for x in each), (name, each)
            gradients[name] = each[0]
    return Outcome(value, gradients)


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are bitwise the same; NaN equals NaN."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7e77), b.nan_to_num(7e77))


def far(got: Tensor, want: Tensor) -> float:
    """Return the largest difference of two losses, relative to max(1, |want|); what is not finite must be the same."""
    assert got.shape == want.shape
    got, want = got.double(), want.double()
    if not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    finite = want.isfinite()
    assert same(got[~finite], want[~finite])
    return ((got - want).abs() / want.abs().clamp_min(1))[finite].max().item() if finite.any() else 0.0


def apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Return the Frobenius-relative difference of every gradient; a tiny one is measured by the largest of all."""
    assert got.keys() == want.keys()
    norms = {name: x.double().norm().item() for name, x in want.items()}
    floor = max([1e-5 * max(norms.values(), default=0.0), 1e-30])
    return {name: (got[name].double() - want[name].double()).norm().item() / max(norms[name], floor) for name in want}
