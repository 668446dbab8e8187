"""Every loss with its options, as a call over several ranks: one entry of `CASES` a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_infonce import DCLLoss, statistics
from fused_infonce import functional as F

from .ranks import Case, Input

D, WIDTH, QUEUE = 5, 3, 7  # components of embeddings and of a guide's or a teacher's, negatives of a queue


def ids(*shape: int) -> Tensor:
    return torch.randint(4, shape)


def booleans(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.7


def weights(*shape: int) -> Tensor:
    """Return weights of which some are 0."""
    return torch.rand(shape, dtype=torch.float64).masked_fill_(torch.rand(shape) < 0.15, 0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def some_absent(*shape: int) -> Tensor:
    """Return biases of which some leave their keys out."""
    return normal(*shape).masked_fill_(torch.rand(shape) < 0.2, -torch.inf)


def each(
    make: Callable[..., Tensor] = normal, *tail: int, head: tuple[int, ...] = (), per: int = 1, more: int = 0,
    **kind: Any,
) -> Input:  # fmt: skip
    """Return an input of shape (*head, per N + more, *tail), of which ranks have their own."""
    return Input(lambda n: make(*head, per * n + more, *tail), len(head), **kind)


def same(make: Callable[..., Tensor], *shape: int, **kind: Any) -> Input:
    """Return an input that is the same on all ranks."""
    return Input(lambda _: make(*shape), None, **kind)


def places(of: str, *tail: int, per: int = 1, more: int = 0, absent: int = -100) -> Input:
    """Return (N, *tail) places among the per N + more rows of another input, in no order; some are absent."""

    def make(n: int) -> Tensor:
        if per * n + more == 0:
            return torch.full((n, *tail), absent)
        return torch.randint(per * n + more, (n, *tail)).masked_fill_(torch.rand(n, *tail) < 0.2, absent)

    return Input(make, of=of)


ROWS, VECTOR, IDS, WEIGHTS = each(normal, D), each(), each(ids), each(weights)
PAIR = {"query": ROWS, "positive_key": ROWS}
SHARED = {**PAIR, "negative_keys": each(normal, D, more=1)}  # as many as a rank's samples and one more
PAIRED = {**PAIR, "negative_keys": each(normal, 3, D)}
TABLE = {**SHARED, "negative_index": places("negative_keys", 4, more=1, absent=-1)}
WIDE = {"query": ROWS, "positive_key": each(normal, D, more=2)}  # more keys than queries
TARGET = {**WIDE, "target": places("positive_key", more=2)}
SEVERAL = {**WIDE, "target": places("positive_key", 3, more=2)}
VIEWS = {"view_a": ROWS, "view_b": ROWS}
IMAGES = {"image_features": ROWS, "text_features": ROWS}
GROUPS = {"query": ROWS, "passages": each(normal, D, per=3)}
SCORED = {**GROUPS, "teacher_scores": each(normal, 3, grad=False)}
GUIDES = {"guide_query": each(normal, WIDTH, grad=False), "guide_key": each(normal, WIDTH, grad=False)}
TAUGHT = {"query": ROWS, "key": ROWS, "teacher_query": each(normal, WIDTH, grad=False),
          "teacher_key": each(normal, WIDTH, grad=False)}  # fmt: skip
WIDELY_TAUGHT = {**TAUGHT, "key": each(normal, D, more=2), "teacher_key": each(normal, WIDTH, more=2, grad=False),
                 "target": places("key", more=2)}  # fmt: skip
RANKED = {"query": ROWS, "documents": each(normal, D, head=(2,))}  # positives and one column of hard negatives
ONE = ("number", "shared")  # temperatures that a loss takes which has none for each row
OF_VIEWS: dict[str, Any] = {"temperatures": ("number", "shared", "rows"), "views": 2}
BY_SCALE: dict[str, Any] = {"scale": "logit_scale"}
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BOTH = ("query_to_doc", "doc_to_query")


def statistics_of(*, reduction: str, **arguments: Any) -> Tensor:
    """Return the statistics of rows as columns of one tensor; those of the keys beside them."""
    found = statistics(**arguments)
    return torch.stack([*found.rows, *found.columns] if arguments.get("columns") else [*found], 1)


def weighted_by_likeness(query: Tensor, positive_key: Tensor, **options: Any) -> Tensor:
    return DCLLoss(**options)(query, positive_key)


def standardized(
    query: Tensor, key: Tensor, teacher_query: Tensor, teacher_key: Tensor, temperature: Any, correction: int,
    normalize: bool, distributed: Any = False, **options: Any,
) -> Tensor:  # fmt: skip
    """Return the distillation of standardised logits, whose temperatures have gradients of keys of all ranks."""
    own = {"distributed": distributed, "correction": correction, "normalize": normalize}
    return F.distilled_info_nce(
        query, key, teacher_query, teacher_key, temperature * F.score_std(query, key, **own),
        teacher_temperature=F.score_std(teacher_query, teacher_key, **own).detach(), normalize=normalize,
        distributed=distributed, **options,
    )  # fmt: skip


def two_sets_of_ids(given: dict[str, Any]) -> dict[str, Any]:
    of_queries, of_keys = given.pop("of_queries"), given.pop("of_keys")
    return given | {"positive_ids": (of_queries, of_keys)}


def unstacked(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"more_views": tuple(given["more_views"])}


def bias(*shape: int) -> Tensor:
    return normal(*shape) - 1


info, decoupled, debiased = F.info_nce, F.decoupled_info_nce, F.debiased_info_nce
CASES = {
    "info_nce": Case(info, PAIR),
    "info_nce symmetric": Case(info, {**PAIR, "weight": WEIGHTS}, {"symmetric": True}),
    "info_nce shared negatives": Case(info, SHARED),
    "info_nce shared negatives and the batch's": Case(info, {**SHARED, "key_bias": VECTOR,
        "negative_bias": each(some_absent, more=1)}, {"in_batch_negatives": True}),
    "info_nce symmetric with negatives": Case(info, {**SHARED, "query_ids": IDS, "key_ids": IDS,
        "negative_ids": each(ids, more=1)}, {"symmetric": True, "in_batch_negatives": True}),
    "info_nce paired negatives": Case(info, {**PAIRED, "negative_mask": each(booleans, 3)},
        {"negative_mode": "paired"}),
    "info_nce paired negatives and the batch's": Case(info, {**PAIRED, "negative_bias": each(some_absent, 3),
        "negative_ids": each(ids, 3), "key_ids": IDS}, {"negative_mode": "paired", "in_batch_negatives": True}),
    "info_nce places in a table": Case(info, {**TABLE, "negative_bias": each(some_absent, more=1)}),
    "info_nce places in a table and the batch's": Case(info, {**TABLE, "key_ids": IDS, "query_ids": IDS,
        "negative_ids": each(ids, more=1)}, {"in_batch_negatives": True}),
    "info_nce ids": Case(info, {**PAIR, "query_ids": IDS, "key_ids": IDS}),
    "info_nce ids of several columns": Case(info, {**PAIR, "query_ids": each(ids, 2), "key_ids": each(ids, 2)},
        {"symmetric": True}),
    "info_nce ids of keys alone": Case(info, {**PAIR, "key_ids": IDS}, {"symmetric": True}),
    "info_nce ids of wide keys alone": Case(info, {**TARGET, "key_ids": each(ids, more=2)}),
    "info_nce biases": Case(info, {**PAIR, "key_bias": VECTOR}, {"symmetric": True}),
    "info_nce biases but of positives": Case(info, {**PAIR, "key_bias": each(some_absent)}, {"positive_bias": False}),
    "info_nce margin": Case(info, {**PAIR, "weight": each(weights, grad=False)}, {"margin": 0.2, "symmetric": True}),
    "info_nce margin of targets": Case(info, {**TARGET, "weight": WEIGHTS}, {"margin": 0.2}),
    "info_nce weights": Case(info, {**PAIR, "weight": WEIGHTS}),
    "info_nce smoothed": Case(info, {**PAIR, "key_ids": IDS}, {"label_smoothing": 0.3, "symmetric": True}),
    "info_nce smoothed targets": Case(info, {**TARGET, "weight": WEIGHTS}, {"label_smoothing": 0.1}),
    "info_nce smoothed with negatives": Case(info, SHARED, {"label_smoothing": 0.1, "in_batch_negatives": True}),
    "info_nce smoothed, negatives alone": Case(info, SHARED, {"label_smoothing": 0.1, "normalize": True}),
    "info_nce targets": Case(info, {**TARGET, "weight": each(weights, grad=False)}),
    "info_nce targets ignored by another number": Case(info, {**WIDE, "target": places("positive_key", more=2,
        absent=-7)}, {"ignore_index": -7}),
    "info_nce several targets": Case(info, {**SEVERAL, "positive_weight": each(weights, 3, grad=False)}),
    "info_nce several targets, all": Case(info, {**SEVERAL, "weight": WEIGHTS, "positive_weight": each(weights, 3,
        grad=False)}, {"positives": "all"}),
    "info_nce several targets, any": Case(info, {**SEVERAL, "negative_keys": each(normal, D, more=1),
        "key_bias": each(normal, more=2)}, {"positives": "any", "in_batch_negatives": True, "margin": 0.2}),
    "info_nce several targets with ids": Case(info, {**SEVERAL, "query_ids": IDS, "key_ids": each(ids, more=2)},
        {"positives": "all"}),
    "info_nce positives of one id": Case(info, {**PAIR, "positive_ids": IDS, "key_bias": VECTOR},
        {"positives": "all", "symmetric": True, "margin": 0.2}),
    "info_nce positives of one id, any": Case(info, {**PAIR, "positive_ids": IDS, "key_bias": VECTOR},
        {"positives": "any", "positive_bias": False}),
    "info_nce positives of ids of two sets": Case(info, {**WIDE, "of_queries": IDS, "of_keys": each(ids, more=2)},
        adapt=two_sets_of_ids),
    "info_nce targets among no keys": Case(info, {**PAIR, "target": places("positive_key"), "key_ids": IDS}),
    "info_nce several targets among no keys": Case(info, {**PAIR, "target": places("positive_key", 3)},
        {"positives": "all"}),
    "info_nce negatives of other ranks alone": Case(info, {**PAIR, "negative_keys": ROWS}),
    "info_nce places in no table": Case(info, {**PAIR, "negative_keys": ROWS, "negative_index":
        places("negative_keys", 2, absent=-1), "negative_ids": IDS, "key_ids": IDS}, {"in_batch_negatives": True}),
    "clip_loss": Case(F.clip_loss, {**IMAGES, "logit_bias": same(normal, 1)}, **BY_SCALE),
    "clip_loss biases": Case(F.clip_loss, {**IMAGES, "image_bias": VECTOR, "text_bias": VECTOR}, **BY_SCALE),
    "clip_loss biases but of pairs": Case(F.clip_loss, {**IMAGES, "image_bias": each(some_absent),
        "text_bias": each(some_absent)}, {"positive_bias": False}, **BY_SCALE),
    "siglip_loss": Case(F.siglip_loss, {**IMAGES, "logit_bias": same(bias, 1)}, **BY_SCALE),
    "siglip_loss negatives and ids": Case(F.siglip_loss, {**IMAGES, "negative_text_features": each(normal, D, more=1),
        "image_ids": IDS, "text_ids": IDS, "negative_ids": each(ids, more=1), "logit_bias": same(bias)}, **BY_SCALE),
    "siglip_loss weights": Case(F.siglip_loss, {**IMAGES, "weight": WEIGHTS, "text_ids": IDS}, {"logit_bias": -2.0},
        **BY_SCALE),
    "nt_xent": Case(F.nt_xent, VIEWS, **OF_VIEWS),
    "nt_xent of three views": Case(F.nt_xent, {**VIEWS, "more_views": each(normal, D, head=(1,))},
        temperatures=("number", "shared", "rows"), views=3, adapt=unstacked),
    "decoupled_nt_xent": Case(F.decoupled_nt_xent, VIEWS, **OF_VIEWS),
    "decoupled_nt_xent weights of positives": Case(F.decoupled_nt_xent, {**VIEWS, "positive_weight": each(normal, per=2,
        views=2)}, **OF_VIEWS),
    "decoupled_info_nce": Case(decoupled, {**PAIR, "positive_weight": VECTOR, "weight": WEIGHTS}, {"symmetric": True}),
    "decoupled_info_nce negatives": Case(decoupled, {**SHARED, "query_ids": IDS, "key_ids": IDS,
        "negative_ids": each(ids, more=1), "key_bias": VECTOR, "negative_bias": each(some_absent, more=1)},
        {"in_batch_negatives": True, "positive_bias": False}),
    "decoupled_info_nce paired negatives": Case(decoupled, PAIRED, {"negative_mode": "paired"}),
    "decoupled_info_nce targets": Case(decoupled, {**WIDE, "target": places("positive_key", more=2, absent=-7)},
        {"ignore_index": -7}),
    "von_mises_fisher_weight": Case(weighted_by_likeness, {"query": ROWS, "positive_key": ROWS}, {"sigma": 0.5},
        **OF_VIEWS),
    "von_mises_fisher_weight of keys": Case(weighted_by_likeness, {"query": ROWS, "positive_key": ROWS}, {"sigma": 0.3,
        "negatives": "keys"}),
    "debiased_nt_xent": Case(F.debiased_nt_xent, VIEWS, {"tau_plus": 0.05, "normalize": True}, **OF_VIEWS),
    "debiased_info_nce": Case(debiased, {**PAIR, "weight": WEIGHTS, "tau_plus": each(lambda n: 0.2 * weights(n),
        grad=False)}, {"normalize": True, "symmetric": True}),
    "debiased_info_nce negatives": Case(debiased, {**SHARED, "query_ids": IDS, "key_ids": IDS, "negative_ids": each(ids,
        more=1)}, {"normalize": True, "in_batch_negatives": True}),
    "debiased_info_nce paired negatives": Case(debiased, PAIRED, {"normalize": True, "negative_mode": "paired"}),
    "debiased_info_nce targets": Case(debiased, {**WIDE, "target": places("positive_key", more=2, absent=-7)},
        {"normalize": True, "ignore_index": -7}),
    "model_aware_nt_xent": Case(F.model_aware_nt_xent, VIEWS, {"alpha": 0.3, "threshold": 0.1, "normalize": True},
        **OF_VIEWS),
    "model_aware_info_nce": Case(F.model_aware_info_nce, {**PAIR, "weight": WEIGHTS}, {"symmetric": True, "alpha": 0.3,
        "threshold": 0.1, "normalize": True}),
    "model_aware_info_nce negatives": Case(F.model_aware_info_nce, {**SHARED, "query_ids": IDS, "key_ids": IDS,
        "negative_ids": each(ids, more=1)}, {"in_batch_negatives": True, "normalize": True}),
    "model_aware_info_nce paired negatives": Case(F.model_aware_info_nce, PAIRED, {"negative_mode": "paired",
        "normalize": True}),
    "model_aware_info_nce targets": Case(F.model_aware_info_nce, {**WIDE, "target": places("positive_key", more=2,
        absent=-7)}, {"ignore_index": -7, "normalize": True}),
    "dual_temperature_info_nce": Case(F.dual_temperature_info_nce, {**PAIR, "weight": WEIGHTS}, {"symmetric": True,
        "inter_temperature": 0.8}),
    "dual_temperature_info_nce negatives": Case(F.dual_temperature_info_nce, {**SHARED, "query_ids": IDS,
        "key_ids": IDS, "negative_ids": each(ids, more=1), "inter_temperature": Input(lambda n: 0.5 + torch.rand(n, 1),
        grad=False)}, {"in_batch_negatives": True}),
    "dual_temperature_info_nce paired negatives": Case(F.dual_temperature_info_nce, PAIRED, {"negative_mode":
        "paired"}),
    "dual_temperature_info_nce targets": Case(F.dual_temperature_info_nce, {**WIDE, "target": places("positive_key",
        more=2, absent=-7)}, {"ignore_index": -7}),
    "robust_info_nce": Case(F.robust_info_nce, {**PAIR, "weight": WEIGHTS}, {"symmetric": True, "rho": 2.0}),
    "robust_info_nce negatives": Case(F.robust_info_nce, {**SHARED, "query_ids": IDS, "key_ids": IDS,
        "negative_ids": each(ids, more=1)}, {"in_batch_negatives": True}),
    "robust_info_nce paired negatives": Case(F.robust_info_nce, PAIRED, {"negative_mode": "paired"}),
    "robust_info_nce targets": Case(F.robust_info_nce, {**WIDE, "target": places("positive_key", more=2, absent=-7)},
        {"ignore_index": -7}),
    "sup_con labels": Case(F.sup_con, {"features": each(normal, 2, D), "labels": IDS}, temperatures=ONE, views=2),
    "sup_con labels of one view": Case(F.sup_con, {"features": each(normal, 1, D), "labels": IDS}, temperatures=ONE),
    "sup_con labels of the first view": Case(F.sup_con, {"features": each(normal, 3, D), "labels": each(ids, 1)},
        {"contrast_mode": "one", "base_temperature": None}, temperatures=ONE),
    "sup_con": Case(F.sup_con, {"features": each(normal, 2, D)}, temperatures=ONE, views=2),
    "sup_con of three views": Case(F.sup_con, {"features": each(normal, 3, D)}, {"base_temperature": 0.2},
        temperatures=ONE, views=3),
    "sup_con of the first of three views": Case(F.sup_con, {"features": each(normal, 3, D)}, {"contrast_mode": "one"},
        temperatures=ONE),
    "grouped_info_nce": Case(F.grouped_info_nce, {**GROUPS, "key_bias": each(per=3)}, {"group_size": 3}),
    "grouped_info_nce own group": Case(F.grouped_info_nce, {**GROUPS, "key_bias": each(per=3)}, {"group_size": 3,
        "in_batch_negatives": False}),
    "grouped_info_nce targets": Case(F.grouped_info_nce, {**GROUPS, "target": places("passages", per=3),
        "key_bias": each(some_absent, per=3)}, {"group_size": 3, "positive_bias": False}),
    "grouped_info_nce kl_div": Case(F.grouped_info_nce, SCORED, {"group_size": 3, "distillation": "kl_div"}),
    "grouped_info_nce kl_div of the own group": Case(F.grouped_info_nce, SCORED, {"group_size": 3,
        "distillation": "kl_div", "in_batch_negatives": False}),
    "grouped_info_nce m3_kd_loss": Case(F.grouped_info_nce, SCORED, {"group_size": 3, "distillation": "m3_kd_loss"}),
    "guided_info_nce": Case(F.guided_info_nce, PAIR, {"margin": 0.1, "normalize": True}),
    "guided_info_nce in all directions": Case(F.guided_info_nce, {**SHARED, "key_ids": IDS, "negative_ids": each(ids,
        more=1)}, {"margin": -0.1, "normalize": True, "contrast_queries": True, "contrast_keys": True}),
    "guided_info_nce by a guide": Case(F.guided_info_nce, {**SHARED, **GUIDES, "guide_negatives": each(normal, WIDTH,
        more=1, grad=False)}, {"margin": 0.1, "margin_strategy": "relative"}),
    "guided_info_nce paired negatives": Case(F.guided_info_nce, {**PAIRED, **GUIDES, "guide_negatives": each(normal, 3,
        WIDTH, grad=False)}, {"negative_mode": "paired", "contrast_keys": True}),
    "guided_info_nce spared negatives": Case(F.guided_info_nce, {**SHARED, **GUIDES}, {"spare_negatives": True,
        "contrast_queries": True}),
    "multiple_negatives": Case(F.multiple_negatives, RANKED),
    "multiple_negatives in all directions": Case(F.multiple_negatives, RANKED, {"directions": ALL}),
    "multiple_negatives partitioned": Case(F.multiple_negatives, RANKED, {"directions": BOTH,
        "partition": "per_direction"}),
    "multiple_negatives hard negatives": Case(F.multiple_negatives, RANKED, {"directions": BOTH,
        "partition": "per_direction", "hardness": "hard_negatives", "hardness_strength": 3.0}),
    "multiple_negatives hard in the batch": Case(F.multiple_negatives, RANKED, {"directions": ALL,
        "hardness": "in_batch_negatives", "hardness_strength": 2.0}),
    "multiple_negatives all hard": Case(F.multiple_negatives, RANKED, {"directions": ALL[:2],
        "hardness": "all_negatives", "hardness_strength": 2.0}),
    "multiple_negatives biases": Case(F.multiple_negatives, {**RANKED, "key_bias": each(head=(2,))},
        {"directions": ALL}),
    "multiple_negatives biases but of positives": Case(F.multiple_negatives, {**RANKED, "key_bias": each(some_absent,
        head=(2,))}, {"directions": BOTH, "partition": "per_direction", "positive_bias": False}),
    "distilled_info_nce": Case(F.distilled_info_nce, TAUGHT),
    "distilled_info_nce symmetric": Case(F.distilled_info_nce, {**TAUGHT, "weight": each(weights, grad=False)},
        {"symmetric": True, "alpha": 0.4}),
    "distilled_info_nce kl_div": Case(F.distilled_info_nce, TAUGHT, {"objective": "kl_div", "teacher_temperature": 0.3,
        "temperature_squared": True}),
    "distilled_info_nce symmetric kl_div": Case(F.distilled_info_nce, TAUGHT, {"objective": "kl_div",
        "symmetric": True}),
    "distilled_info_nce targets": Case(F.distilled_info_nce, {**WIDELY_TAUGHT, "weight": WEIGHTS}, {"alpha": 0.4,
        "normalize_teacher": False}),
    "distilled_info_nce targets ignored": Case(F.distilled_info_nce, {**WIDELY_TAUGHT, "target": places("key", more=2,
        absent=-7)}, {"ignore_index": -7}),
    "score_std": Case(standardized, {**TAUGHT, "key": each(normal, D, more=2), "teacher_key": each(normal, WIDTH,
        more=2, grad=False)}, {"correction": 1}, temperatures=("number",)),
    "moco_loss": Case(F.moco_loss, {"query": ROWS, "key": each(normal, D, grad=False), "queue": same(normal, D, QUEUE,
        grad=False)}),
    "moco_loss biases": Case(F.moco_loss, {"query": ROWS, "key": each(normal, D, grad=False), "queue": same(normal, D,
        QUEUE, grad=False), "key_bias": VECTOR, "negative_bias": same(normal, QUEUE)}),
    "statistics": Case(statistics_of, {"query": ROWS, "key": ROWS}, reductions=("none",)),
    "statistics of columns": Case(statistics_of, {"query": ROWS, "key": ROWS, "query_ids": IDS, "key_ids": IDS},
        {"columns": True}, reductions=("none",)),
    "statistics of targets": Case(statistics_of, {"query": ROWS, "key": each(normal, D, more=2), "target": places("key",
        more=2, absent=-7)}, {"ignore_index": -7}, reductions=("none",)),
    "statistics of paired negatives": Case(statistics_of, {"query": ROWS, "key": ROWS, "negative_keys": each(normal, 3,
        D)}, {"negative_mode": "paired"}, reductions=("none",)),
    "statistics of places in a table": Case(statistics_of, {"query": ROWS, "key": ROWS, "negative_keys": each(normal, D,
        more=1), "negative_index": places("negative_keys", 4, more=1, absent=-1), "key_ids": IDS,
        "negative_ids": each(ids, more=1)}, {"in_batch_negatives": True}, reductions=("none",)),
    "statistics of negatives": Case(statistics_of, {"query": ROWS, "key": ROWS, "negative_keys": each(normal, D,
        more=1), "key_bias": VECTOR, "negative_bias": each(more=1)}, {"in_batch_negatives": True,
        "positive_bias": False}, reductions=("none",)),
}  # fmt: skip
