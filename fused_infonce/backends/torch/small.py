"""Small problems in PyTorch, all scores at once: there calls of operators are the cost, and not their arithmetic.

S (N, M) are the scores in base 2 and E their exponentials, less the maximum of a row or column where they need it;
x are the queries' rows as the logits see them, and y those of all sets of keys. W is as in `chunked`, times t:

    one direction   W = f E               f_i = u_i / sum_j E_ij
    both            W = (f + f') E        columns' f' beside the rows' f
    Q is K          W + W^T               what multiplies x for the gradient of both sides

Biases c of keys, and c' of queries that keys are scored against, are in the exponents of E; or where E as it is fits
and serves both directions, in W = (f 2^c + f' 2^c') E and in the sums of E.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import LN2, LOG2E, KeySet, OnePass, Problem, RowStatistics, Statistics, Upstream
from ..indexing import same_ids
from ..plan import DENSE, Plan
from ..precision import EXPONENT_ROOM
from ..row_losses import ROW_LOSSES, temperature_gradient, weighted
from ..rows import Rows
from .keys import Guide
from .value import Kind, value
from .work import FLOOR, State, finite, log_sum, statistics_of


class Dense:
    """A problem made ready for dense work: x, y, and the pairs that are no negatives.

    Unit rows are made for queries and keys in one. `kept` are such, where they have been made before.
    """

    def __init__(self, problem: Problem, kept: Sequence[Tensor] = ()):
        query, *keys = problem.sets
        n, acc = query.rows.shape[0], problem.acc_dtype
        target = None if problem.two_views else problem.target
        self.problem, self.fits = problem, False
        self.scored: Tensor | None = None  # the scores, which may have become coefficients where they lie
        self.same = problem.self_similar or (len(keys) == 1 and query.rows is keys[0].rows)  # keys are the queries
        self.rows: list[Rows] = []
        if kept:
            self.rows = [Rows.made(kept, True, False)]
        elif problem.normalize:
            rows = query.rows if self.same else torch.cat(problem.inputs)
            self.rows = [Rows(rows, True, None, acc, spare=not self.same)]
        else:
            self.rows = [Rows(query.rows, False, query.scale, acc)]
            if not self.same:
                self.rows.append(_together(keys, acc))
        unit = self.rows[0].unit
        if self.same or not problem.normalize:
            self.x, self.y = unit, self.rows[-1].unit
        else:
            self.x, self.y = unit.split_with_sizes((n, unit.shape[0] - n))
        self.inv_t = problem.temperature.inverse
        self.dims = (1, 0) if problem.columns else (1,)  # along which the scores are summed
        self.target = target  # of a row without one, any column; None: on diagonals
        self.inside: Tensor | None = None  # (N, 1): which targets are there; None: all
        if target is not None and not problem.self_similar:
            last = keys[0].rows.shape[0] - 1
            least, most = torch.aminmax(target)
            if least.item() < 0 or most.item() > last:
                self.inside = ((target >= 0) & (target <= last)).unsqueeze(1)
                self.target = target.clamp(0, last)
        self.index = None if self.target is None else self.target.unsqueeze(1)
        # of what is scored, by the dimension along which its scores are summed
        self.biases = {1: _biases(keys, acc), 0: query.bias if problem.columns else None} if problem.biases else {}
        masked = not kept and (query.ids is not None or problem.ceiling is not None)
        self.masks = self._masks() if masked else []

    def scores(self, plan: Plan) -> Tensor:
        """Return S, and note whether all its exponentials fit as they are."""
        scores = self.products(LOG2E)
        self.fits = plan.bounded and not plan.full
        if not (self.fits or plan.full or self.biases):
            room = EXPONENT_ROOM[scores.dtype]
            least, most = torch.aminmax(scores)
            added = self.problem.largest_added * LOG2E if self.problem.added else 0.0
            self.fits = -room <= least.item() and most.item() + added <= room
        return scores

    def products(self, scale: float, added: Tensor | None = None) -> Tensor:
        """Return `scale x . y / t`, (N, M), to all of which (1,) is added, and note where the targets' lie."""
        if added is None:  # times 0 it is not read; one made before might be of a mode that is over
            found = torch.addmm(self.x.new_empty(()), self.x, self.y.T, beta=0, alpha=scale * self.inv_t)
        else:
            found = torch.addmm(added, self.x, self.y.T, alpha=scale * self.inv_t)
        self.own = found.diagonal()  # a view, which is used more than once
        self.views = self._of_views(found) if self.problem.two_views else ()
        self.scored = found
        return found

    def positives(self, scores: Tensor) -> Tensor:
        """Return the (N,) scores of the targets: 0 for -1, NaN out of range or where they are infinite."""
        if self.index is not None:
            pos = scores.gather(1, self.index).squeeze(1)
        else:
            pos = torch.cat(self.views) if self.views else self.own.clone()
        return pos if self.fits and self.inside is None else self.there(pos)

    def exact_positives(self) -> Tensor:
        """Return the (N,) logits of the targets, without what a factor for base 2 would add to the rounding of all."""
        n = self.x.shape[0]
        if self.target is not None:
            y = self.y.index_select(0, self.target)
        else:
            y = self.y.roll(n // 2, 0) if self.problem.two_views else self.y[:n]
        return self.there(torch.linalg.vecdot(self.x, y).mul_(self.inv_t))

    def there(self, pos: Tensor) -> Tensor:
        """Return logits of the targets, 0 for -1, NaN out of range or where they are infinite."""
        if not self.fits:
            pos = pos + (pos - pos)
        if self.inside is None or self.problem.target is None:
            return pos
        missing = torch.where(self.problem.target == -1, 0.0, torch.nan).to(pos.dtype)
        return torch.where(self.inside.squeeze(1), pos, missing)

    def exclude(self, scores: Tensor, value: float) -> None:
        """Write `value` where a column is no negative of its row."""
        for cols, mask in self.masks:
            scores[:, cols].masked_fill_(mask, value)
        if self.index is None or self.problem.self_similar:
            self.own.fill_(value)
        for view in self.views:
            view.fill_(value)
        if self.index is None:
            return
        if self.inside is None:
            scores.scatter_(1, self.index, value)
        else:
            scores.scatter_(1, self.index, torch.where(self.inside, value, scores.gather(1, self.index)))

    def _of_views(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of the targets of the rows of either view, as views of all scores."""
        n = scores.shape[0] // 2
        return scores.diagonal(n), scores.diagonal(-n)

    def _masks(self) -> list[tuple[slice, Tensor]]:
        """Return for each set of keys that has ids or a guide its columns, and which of them these leave out."""
        query, ceiling, start = self.problem.query, self.problem.ceiling, 0
        masks: list[tuple[slice, Tensor]] = []
        guide = None if query.guide is None or ceiling is None else Guide(query.guide, ceiling)
        for keys in self.problem.keys:
            cols = slice(start, start + keys.rows.shape[0])
            start = cols.stop
            if query.ids is not None and keys.ids is not None:
                masks.append((cols, same_ids(query.ids, keys.ids)))
            if guide is not None and keys.guide is not None:
                view = Rows(keys.guide, True, None, self.problem.acc_dtype).unit
                masks.append((cols, guide.rejects(view, slice(0, len(guide.query)))))
        return masks

    def term(self, dim: int) -> Tensor | None:
        """Return the biases in base 2, (M,) of a row's scores (dim 1) or (N, 1) of a column's; None: 0."""
        bias = self.biases.get(dim)
        return None if bias is None else (bias * LOG2E if dim else bias[:, None] * LOG2E)

    def logits(self, scores: Tensor, dim: int) -> Tensor:
        term = self.term(dim)
        return scores if term is None else scores + term

    def sum(self, e: Tensor, dim: int) -> Tensor:
        """Return the sum of exponentials along a dimension, times the factors of their biases where E has none."""
        term = self.term(dim) if self.biases and self.fits else None
        return e.sum(dim) if term is None else torch.mv(e if dim else e.T, term.flatten().exp2())

    def exponentials(self, scores: Tensor, dims: Sequence[int], moments: bool) -> tuple[list[Tensor], list[State]]:
        """Return E and its states (m, l), with `moments` (m, l, s), along each of `dims`; the scores are used up.

        Where every exponential fits, one E serves all, else each has its own. A logit of -inf, which is never
        legitimate, makes l NaN.
        """
        if self.fits:
            self.exclude(scores, FLOOR)
            if not moments:
                e = scores.exp2_()
                return [e], [(None, self.sum(e, dim)) for dim in dims]
            e = scores.exp2()
            scores.mul_(e)
            return [e], [(None, self.sum(e, dim), self.sum(scores, dim)) for dim in dims]
        self.exclude(scores, 0.0)
        lost = [scores.amin(dim) == -torch.inf for dim in dims]
        self.exclude(scores, -torch.inf)
        found, states = [], []
        for dim, bad in zip(dims, lost, strict=True):
            logits = self.logits(scores, dim)
            m = logits.amax(dim)
            e = torch.sub(logits, finite(m).unsqueeze(dim)).exp2_()
            found.append(e)
            states.append((m, e.sum(dim).masked_fill_(bad, torch.nan)))
        if not moments:
            return found, states
        self.exclude(scores, 0.0)
        every = zip(found, states, dims, strict=True)
        return found, [(*state, (e * scores).sum(dim)) for e, state, dim in every]

    def again(self, plan: Plan, directions: Sequence[RowStatistics]) -> list[Tensor]:
        """Return E less the maxima of each direction's statistics."""
        scores = self.scores(plan)
        self.exclude(scores, -torch.inf)
        found = [
            torch.sub(self.logits(scores, 1 - i), x.maximum.unsqueeze(1 - i)).exp2_() for i, x in enumerate(directions)
        ]
        self.fits = False
        return found

    def divisor(self, total: Tensor) -> Tensor:
        """Return sums of exponentials to divide by, in which a sum of no terms is not 0."""
        never = not self.masks and not self.biases and self.y.shape[0] > 1 + self.problem.self_similar
        return total if never else total.clamp_min(torch.finfo(total.dtype).tiny)

    def coefficients(
        self, exponentials: Sequence[Tensor], row: Tensor, column: Tensor | None, v: Tensor, sign: int, spare: bool
    ) -> Tensor:
        """Return W, added to its transpose where both sides are one set of rows.

        row, column: the factors f and f'. sign v: dL/dpos, (N,). spare: keep the exponentials as they are.
        """
        e, *others = exponentials
        factor = row.unsqueeze(1)
        # E is its own transpose
        both = self.same and self.fits and column is None and (self.problem.self_similar or self.index is None)
        both = both and not self.biases
        if self.biases:
            self.of_biases = self._bias_gradients([e, *(others or [e])], row, column)
        if self.biases and self.fits:
            term, column_term = self.term(1), self.term(0)
            factor = factor if term is None else factor * term.exp2()
            if column is not None:
                factor = factor + (column if column_term is None else column * column_term.exp2())
        elif both or (column is not None and not others):  # one exponential serves both directions
            factor = factor + (row if column is None else column)
        w = e * factor if spare else e.mul_(factor)
        if column is not None and others:
            w.addcmul_(others[0], column)
        if self.problem.two_views:
            of_views = v.view(2, -1)
            parts = [of_views.sum(0)] * 2 if both else of_views.unbind()
            for view, part in zip(self.views if w is self.scored else self._of_views(w), parts, strict=True):
                view.add_(part, alpha=sign)
        elif self.target is None or self.index is None:
            w.diagonal().add_(v, alpha=sign * (1 + both))
        else:
            v = v + v.index_select(0, self.target) if both else v
            v = v.mul(sign).unsqueeze(1)
            w.scatter_add_(1, self.index, v if self.inside is None else torch.where(self.inside, v, 0))
        return w if both or not self.same else w + w.T

    def _bias_gradients(self, e: Sequence[Tensor], row: Tensor, column: Tensor | None) -> dict[int, Tensor]:
        """Return dc_j = sum_i f_i E_ij and dc'_i = sum_j f'_j E_ij, of E with its bias, by dimension."""
        found = {1: torch.mv(e[0].T, row)} | ({} if column is None else {0: torch.mv(e[1], column)})
        if not self.fits:
            return found
        terms = {dim: self.term(dim) for dim in found}
        return {dim: g if (c := terms[dim]) is None else g * c.flatten().exp2() for dim, g in found.items()}

    def by_bias(self, wanted: Sequence[object], scale: float = 1.0) -> list[Tensor | None]:
        """Return `scale` times the gradients of `Problem.biases`; one that is not wanted is None."""
        if not self.biases:
            return []
        parts: Sequence[Tensor | None] = self.of_biases[1].split([len(s.rows) for s in self.problem.keys])
        parts = [self.of_biases.get(0), *parts]
        every = [parts[place] for place in self.problem.biased]
        return [g * scale if g is not None and want else None for g, want in zip(every, wanted, strict=True)]

    def gradients(self, w: Tensor, wanted: Sequence[bool], scale: float) -> Sequence[Tensor]:
        """Return `scale` W y and `scale` W^T x, of all keys; for one set of rows on both sides their sum."""
        n = self.x.shape[0]
        grads = [torch.empty_like(self.rows[0].unit)]
        if len(self.rows) > 1:
            grads.append(torch.empty_like(self.y))
        sides = grads if self.same or len(grads) > 1 else grads[0].split_with_sizes((n, self.y.shape[0]))
        if wanted[0] or self.same:
            sides[0].addmm_(w, self.y, beta=0, alpha=scale)
        if len(sides) > 1 and any(wanted[1:]):
            sides[1].addmm_(w.T, self.x, beta=0, alpha=scale)
        self.grads = grads
        return sides

    def finish(self) -> None:
        """Turn the gradients of the rows as the logits see them into those of the inputs, in place."""
        for i, rows in enumerate(self.rows):
            rows.finish(self.grads[i])

    def by_input(self, sides: Sequence[Tensor], wanted: Sequence[object]) -> list[Tensor | None]:
        """Return the gradients of the queries and of each set of keys; a gradient that is not wanted is None."""
        first = sides[0] if wanted[0] else None
        if self.same:  # the gradient of both sides is the first's
            return [first, torch.zeros_like(sides[0]) if wanted[1] else None]
        if len(wanted) == 2:
            return [first, sides[1] if wanted[1] else None]
        parts = sides[1].split([len(rows) for rows in self.problem.inputs[1:]])
        return [first, *(part if want else None for part, want in zip(parts, wanted[1:], strict=True))]


def _together(sets: Sequence[KeySet], acc: torch.dtype) -> Rows:
    """Return the raw rows of sets of keys, one after another."""
    if len(sets) == 1:
        return Rows(sets[0].rows, False, sets[0].scale, acc)
    scale = None
    if any(s.scale is not None for s in sets):  # autocast divided the rows of some
        scale = torch.cat([s.rows.new_ones(len(s.rows), dtype=acc) if s.scale is None else s.scale for s in sets])
    return Rows(torch.cat([s.rows for s in sets]), False, scale, acc)


def _biases(sets: Sequence[KeySet], acc: torch.dtype) -> Tensor | None:
    """Return the biases of sets of keys, one after another; None where no set has some."""
    if all(s.bias is None for s in sets):
        return None
    return torch.cat([s.rows.new_zeros(len(s.rows), dtype=acc) if s.bias is None else s.bias for s in sets])


def statistics(problem: Problem, plan: Plan, keep: list[Tensor] | None = None) -> Statistics:
    """Compute `Backend.statistics` for a dense plan."""
    dense = Dense(problem)
    scores = dense.scores(plan)
    pos = dense.exact_positives()
    exponentials, states = dense.exponentials(scores, dense.dims, plan.mean)
    rows, *columns = [statistics_of(state, pos, size) for state, size in zip(states, scores.shape, strict=False)]
    if keep is not None and scores.numel() <= DENSE:
        keep += exponentials
        keep += dense.rows[0].tensors() if problem.normalize else []
    return Statistics(rows, columns[0] if columns else None)


def gradients(
    problem: Problem, plan: Plan, statistics: Statistics, upstream: Upstream, dtypes: Sequence[torch.dtype | None],
    kept: Sequence[Tensor] = (),
) -> list[Tensor | None]:  # fmt: skip
    """Compute `Backend.gradients` for a dense plan, from tensors that `statistics` kept or from new products."""
    rows = [x for x in statistics if x is not None]
    unit = 2 if kept and problem.normalize else 0  # tensors of the unit rows
    dense = Dense(problem, kept[len(kept) - unit :])
    if kept:
        exponentials, dense.fits = kept[: len(kept) - unit], plan.bounded and not plan.full
    else:
        exponentials = dense.again(plan, rows)
    slopes = [upstream.neg, upstream.column_neg]
    row, *column = [u * x.scale for u, x in zip(slopes, rows, strict=False) if u is not None]
    w = dense.coefficients(exponentials, row, column[0] if column else None, upstream.pos, sign=1, spare=bool(kept))
    rows_of = dtypes[: len(problem.sets)]
    sides = dense.gradients(w, [dtype is not None for dtype in rows_of], dense.inv_t)
    dense.finish()
    found = [*dense.by_input(sides, rows_of), *dense.by_bias(dtypes[len(problem.sets) :])]
    return [g if g is None or dtype is None else g.to(dtype) for g, dtype in zip(found, dtypes, strict=True)]


def onepass(problem: Problem, plan: Plan, loss: str, weight: Tensor | float, wanted: Sequence[bool]) -> OnePass:
    """Compute `Backend.onepass` for a dense plan."""
    if plan.value and not isinstance(weight, Tensor):
        key = None if problem.self_similar else problem.keys[0].rows
        total = value(problem.query.rows, key, Kind.of(problem, plan, loss, weight))
        return OnePass(total, [None] * len(problem.sets), None)
    dense = Dense(problem)
    scores = dense.scores(plan)
    pos = dense.positives(scores)  # in base 2
    exponentials, states = dense.exponentials(scores, dense.dims, moments=plan.record)
    rows = [statistics_of(state, pos * LN2)[:3] for state in states] if plan.record else []
    # (N,), or where columns are asked for (2, N): rows of theirs below
    m, sums, *_ = states[0] if len(states) == 1 else map(_stack, zip(*states, strict=True))
    margin = log_sum((m, sums)).sub_(pos, alpha=LN2)
    if problem.offset is not None:
        margin = margin - problem.offset
    share, each = (1.0, weight) if isinstance(weight, Tensor) else (weight, None)  # one for all is multiplied last
    share /= len(states)
    value_of, slope_of = ROW_LOSSES[loss]
    values = value_of(margin)
    total = (values if each is None else weighted(values, each)).sum().mul_(share)
    *inputs, temperature = wanted
    if not plan.gradients:
        return OnePass(total, [None] * len(problem.sets), None, rows=rows)
    inputs, biases = inputs[: len(problem.sets)], inputs[len(problem.sets) :]

    slope = slope_of(margin) if each is None else weighted(slope_of(margin), each)
    factor = slope / dense.divisor(sums)  # type: ignore[arg-type]
    row, column, v = (*factor.unbind(), slope.sum(0)) if problem.columns else (factor, None, slope)
    w = dense.coefficients(exponentials, row, column, v, sign=-1, spare=False)
    sides = dense.gradients(w, [inputs[0] or temperature, *inputs[1:]], share * dense.inv_t)
    of_t = None
    if temperature:  # x_i . G_i = u_i mean_i + v_i pos_i; where the keys are the queries, that of both sides
        logits = torch.linalg.vecdot(sides[0], dense.x)
        of_t = temperature_gradient(logits.div_(2) if dense.same else logits, problem.temperature)
    dense.finish()
    offset = None if problem.offset is None else slope * -share
    return OnePass(total, dense.by_input(sides, inputs), of_t, (), dense.by_bias(biases, share), offset, rows)


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.stack(parts)  # type: ignore[arg-type]
