"""Collapse made visible while training: a handler for MONAI's trainer that measures features of held-out images."""

from __future__ import annotations

import logging
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from medsd.checks import check_number
from medsd.errors import DatasetError, TrainingError
from medsd.networks.modes import evaluating
from medsd.pretrain.collapse import Spectrum, alignment, collapse_warning, spectrum, uniformity
from medsd.pretrain.images import UnlabelledImages
from medsd.pretrain.med_moco import MedMoCo
from medsd.pretrain.views import ViewSettings, draw_views
from medsd.tables import write_table

logger = logging.getLogger(__name__)

_MORE = "hold more out (held_out, or validation_share where there are labels)"


class CollapseHandler:
    """At the end of each epoch, measures of the features go into the trainer's `state.metrics`, and so into its logs.

    Of the query encoder's pooled features in evaluation mode, before whitening: `effective_rank`,
    `participation_ratio`, `mean_abs_correlation`; of the embeddings `embedding_rank`, `alignment` of two views and
    `uniformity`; and `held_out_images`, less one of which a rank can be at most. See `medsd.pretrain.collapse`.
    Held-out images are taken whole and unchanged, but for the views. A rank that is below a tenth of the dimensions
    after the last epoch is told in words, once. Of several processes all measure the same images, since whitening
    takes its moments over all of them.

    Args:
        dataset: images that are not trained on.
        images: the most that are measured (whole batches), drawn by the seed; a spectrum wants five times as many as
            dimensions.
        batch_size: images at once.
        views: as in training.
        seed: draws images and views.
        folder: where `spectrum.csv` is kept, the singular values of the last epoch, largest first; None for nowhere.

    Raises:
        ConfigError: a number out of its range.
        DatasetError: fewer than two images.
    """

    def __init__(
        self,
        dataset: UnlabelledImages,
        images: int,
        batch_size: int,
        views: ViewSettings,
        seed: int = 0,
        folder: str | None = None,
    ) -> None:
        check_number("images", images, "[2, inf)", whole=True)
        check_number("batch_size", batch_size, "[1, inf)", whole=True)
        self.views, self.seed, self.folder = views, seed, folder
        chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:images])
        if len(chosen) < 2:
            raise DatasetError(f"held-out images: {len(chosen)}; at least 2 are needed, {_MORE}")
        kept = Subset(dataset, cast(list[int], chosen.tolist()))
        # The embeddings of "w2" are whitened by their batch, for which what is left over may be too few.
        self.loader: DataLoader[Any] = DataLoader(kept, batch_size, drop_last=len(kept) >= batch_size)
        self._ranks: dict[str, float] = {}
        self._warnings: list[str | None] = []

    def attach(self, engine: Engine) -> None:
        """Measure after every epoch of the engine, and warn after the last."""
        engine.add_event_handler(Events.STARTED, self._try)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._warn)

    def __call__(self, engine: Engine) -> None:
        """Measure now."""
        network = cast(MedMoCo, engine.network)  # type: ignore[attr-defined]
        features, first, second = self._embedded(network)
        if not all(each.isfinite().all() for each in (features, first, second)):
            raise TrainingError(
                f"features are not finite after epoch {engine.state.epoch}; lower the learning rate (pretrain_lr) in "
                "another output_dir; this one keeps its last checkpoint"
            )
        of_features, of_embeddings = spectrum(features), spectrum(first)
        measured = {"features": of_features, "embeddings": of_embeddings}
        self._warnings = [collapse_warning(found, what, self._ranks.get(what)) for what, found in measured.items()]
        self._ranks = {what: found.effective_rank for what, found in measured.items()}
        if idist.get_rank() == 0 and self.folder is not None:
            _write_spectra(Path(self.folder) / "spectrum.csv", of_features, of_embeddings)
        engine.state.metrics |= {
            "effective_rank": of_features.effective_rank,
            "participation_ratio": of_features.participation_ratio,
            "mean_abs_correlation": of_features.mean_abs_correlation,
            "embedding_rank": of_embeddings.effective_rank,
            "alignment": alignment(first, second),
            "uniformity": uniformity(first),
            "held_out_images": len(features),
        }

    def _warn(self, _engine: Engine) -> None:
        for warning in filter(None, self._warnings):
            if idist.get_rank() == 0:
                logger.warning("%s", warning)

    def _try(self, engine: Engine) -> None:
        """Refuse too few images before anything is trained, and not after the first epoch.

        Raises:
            DatasetError: fewer samples than are whitened together.
        """
        network = cast(MedMoCo, engine.network)  # type: ignore[attr-defined]
        images = next(iter(self.loader))["image"].to(next(network.parameters()).device)
        views = draw_views(images, torch.Generator().manual_seed(self.seed), self.views).images
        with evaluating(network), torch.inference_mode():
            try:
                network.embed(network.normalise(views))
            except TrainingError as error:
                raise DatasetError(f"held-out images: {len(images)} are too few ({error}); {_MORE}") from error

    def _embedded(self, network: MedMoCo) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the images, and embeddings of two views of each."""
        draws, device = torch.Generator().manual_seed(self.seed), next(network.parameters()).device
        features: list[Tensor] = []
        first: list[Tensor] = []
        second: list[Tensor] = []
        with evaluating(network), torch.inference_mode():
            for batch in self.loader:
                images = batch["image"].to(device)
                features.append(network.embed(network.normalise(images))[0].cpu())
                for embedded in (first, second):
                    views = draw_views(images, draws, self.views).images
                    embedded.append(network.embed(network.normalise(views))[1].cpu())
        return torch.cat(features), torch.cat(first), torch.cat(second)


def _write_spectra(path: Path, features: Spectrum, embeddings: Spectrum) -> None:
    columns = ("features", "embeddings")
    rows = zip_longest(features.singular_values.tolist(), embeddings.singular_values.tolist())
    write_table(path, [dict(zip(columns, row, strict=True)) for row in rows], columns)
