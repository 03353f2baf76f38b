"""Contrast of queries and keys, and the encoder that the keys come from (MoCo, arXiv 1911.05722; v2, 2003.04297)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.networks.moments import all_of_processes, first_of_processes


def info_nce(
    q: Tensor, k: Tensor, queue_keys: Tensor, temperature: float, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """InfoNCE: cross-entropy of telling a query's own key from those of the queue.

    Args:
        q, k: (B, dim) queries and their keys, of unit length.
        queue_keys: (dim, K) keys of other images, without graph; not changed before the backward pass.
        temperature: above 0, divides the similarities.
        excluded: (B, K) bool, which keys are no negatives of which queries; None for none.

    Returns:
        The mean loss, a scalar in single precision whatever the autocast, and the share of queries that are nearest
        to their own key, without graph.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = (each if each.dtype == torch.float64 else each.float() for each in (q, k))
        own = torch.einsum("nc,nc->n", q, k)[:, None]
        others = torch.einsum("nc,ck->nk", q, queue_keys.to(q.dtype))
        if excluded is not None:
            others = others.masked_fill(excluded, -math.inf)
        logits = torch.cat([own, others], dim=1) / temperature
        target = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        accuracy = (logits.detach().argmax(dim=1) == 0).float().mean()
        return F.cross_entropy(logits, target), accuracy


def momentum_at(progress: float, start: float) -> float:
    """The key encoder's momentum: from `start` to 1 by a cosine (BYOL, arXiv 2006.07733) over `progress` 0 to 1.

    .999 throughout, as in MoCo, is too slow for a thousand steps.
    """
    return 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def follow(key: nn.Module, query: nn.Module, momentum: float) -> None:
    """Move the parameters of `key` towards those of its twin `query`: momentum * key + (1 - momentum) * query.

    Buffers stay: BatchNorm statistics of the key encoder are those of its own batches.
    """
    for ours, theirs in zip(key.parameters(), query.parameters(), strict=True):
        ours.mul_(momentum).add_(theirs * (1 - momentum))


@torch.no_grad()
def shuffle_ranks(values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Deal the samples of all processes out anew, so that BatchNorm cannot tell which keys belong together.

    Of one process the batch is left as it is: an order within it changes no statistics.

    Args:
        values: (B, ...) of this process, B the same on every process; without graph.
        generator: on the CPU; the first process's draw counts on all.

    Returns:
        (B, ...) samples to use here, and the order (B * processes,) with which `unshuffle_ranks` brings results back.
    """
    batch, ranks = len(values), dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks == 1:
        return values, torch.arange(batch)
    order = first_of_processes(torch.randperm(batch * ranks, generator=generator).to(values.device))
    return all_of_processes(values)[_own_share(order, batch)], order


@torch.no_grad()
def unshuffle_ranks(values: Tensor, order: Tensor) -> Tensor:
    """Results (B, ...) of shuffled samples, brought back to the processes and places that the samples came from."""
    batch = len(values)
    if len(order) == batch:
        return values
    return all_of_processes(values)[_own_share(order.argsort(), batch)]


def _own_share(order: Tensor, batch: int) -> Tensor:
    return order[dist.get_rank() * batch :][:batch]
