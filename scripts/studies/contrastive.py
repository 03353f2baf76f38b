"""A short self-supervised training (SimCLR, Chen et al. 2020): an encoder without labels, for studies of saliency."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.evaluate.scores import auc
from medsd.networks.classifier import Normalise
from medsd.networks.modes import evaluating
from medsd.training.augment import augment

_WIDTH = 128
_INPUT = Normalise()


def pretrain(
    encoder: nn.Module,
    images: Tensor,
    epochs: int,
    seed: int,
    batch_size: int = 128,
    lr: float = 2e-3,
    temperature: float = 0.2,
    side_px: int = 64,
) -> nn.Module:
    """Train an encoder so that two views of an image agree more than views of two images; its head is thrown away.

    Departures from the paper (our choice, for minutes on a CPU): AdamW in place of LARS, a stain jitter in place of
    colour jitter and blur, quarter turns, a lower temperature, small batches. The seed sets the order, the views and
    the head; what the encoder starts from is the caller's.

    Args:
        encoder: images (B, 3, H, W) as `Normalise` gives them to features (B, d, h, w); trained in place.
        images: (N, 3, S, S) uint8, square.
        epochs: passes over the images; a last incomplete batch is left out.
        seed: of everything that is drawn.
        batch_size: images a step, two views of each.
        lr: peak of the one-cycle schedule.
        temperature: of the loss.
        side_px: side of the views.

    Returns:
        The encoder, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = pooled(encoder, images[:2]).shape[1]
        head = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, _WIDTH))
    steps = len(images) // batch_size
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    encoder.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: steps * batch_size].split(batch_size):
            pair = torch.cat([views(images[rows], side_px, generator) for _ in range(2)])
            optimizer.zero_grad()
            nt_xent(head(encoder(pair).mean(dim=(2, 3))), temperature).backward()
            optimizer.step()
            schedule.step()
    return encoder.eval()


def nt_xent(projected: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding an image's other view among all others; rows i and i + B of (2B, d) are a pair."""
    unit = F.normalize(projected, dim=1)
    similarity = (unit @ unit.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(unit)).roll(len(unit) // 2))


def views(images: Tensor, side_px: int, generator: torch.Generator) -> Tensor:
    """A random view of each image, (B, 3, side_px, side_px) as the encoder takes it: crop, turn, mirror, stain.

    The crop's side is uniform in 0.5 to 1 of the image's.
    """
    batch = len(images)
    share = 0.5 + 0.5 * torch.rand(batch, generator=generator)
    shift = (2 * torch.rand((batch, 2), generator=generator) - 1) * (1 - share[:, None])
    square = torch.eye(2) * share[:, None, None]
    grid = F.affine_grid(torch.cat([square, shift[..., None]], dim=2), [batch, 3, side_px, side_px], False)
    pixels = _INPUT(augment(images, generator, stain=0.3))
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


@torch.no_grad()
def pooled(encoder: nn.Module, images: Tensor) -> Tensor:
    """Mean features (N, d) of images (N, 3, H, W) uint8."""
    with evaluating(encoder):
        return torch.cat([encoder(_INPUT(batch)).mean(dim=(2, 3)) for batch in images.split(256)])


def probe_auc(
    encoder: nn.Module, images: Tensor, labels: npt.NDArray[np.int64], held_out: npt.NDArray[np.bool_]
) -> float:
    """AUC, on the images held out, of a logistic regression that learnt on the features of the others."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = pooled(encoder, images).numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    probe.fit(features[~held_out], labels[~held_out])
    return auc(labels[held_out], probe.decision_function(features[held_out]))
