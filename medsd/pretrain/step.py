"""The step of pre-training for MONAI's `SupervisedTrainer(iteration_update=...)`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from monai.engines.trainer import SupervisedTrainer
from torch import Tensor

from medsd.pretrain.med_moco import MedMoCo, PretrainTerms
from medsd.pretrain.views import ViewSettings, draw_views
from medsd.training.optimise import OptimiserStep


@dataclass
class PretrainStep(OptimiserStep):
    """One step of Med-MoCo on a batch {"image": uint8 (B, 3, H, W), "group": (B,) int64}; see `OptimiserStep`.

    The trainer's network is the `MedMoCo`, which is its own loss. Two views of each image are drawn where the network
    runs.

    A batch in pieces is one step for queue and key encoder, too: the key encoder follows before the first piece, and
    the keys of all pieces go into the queue after the optimiser's step, so that every piece is told apart from the
    same keys by the same encoder. A step that fails leaves no keys behind.

    Attributes:
        views: how a view is drawn.
    """

    key_prefix: ClassVar[str] = "pretrain_"

    views: ViewSettings = field(default_factory=ViewSettings)

    def __call__(self, engine: SupervisedTrainer, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Run the step; returns the loss and its parts as floats.

        Raises:
            TrainingError: the loss is not finite, or the batch is too small.
            ConfigError: the queue is no multiple of the batch of all processes.
        """
        network, device = cast(MedMoCo, engine.network), torch.device(engine.state.device)
        draws = torch.Generator().manual_seed(self.seed_of(engine))
        images, groups = (batch[key].to(device, non_blocking=True) for key in ("image", "group"))
        first, second = (draw_views(images, draws, self.views) for _ in range(2))
        # Not `medsd.networks.modes.training`: the key encoder requires no gradient, but its BatchNorms see batches.
        network.train()
        network.follow((engine.state.iteration - 1) / (engine.state.max_epochs * engine.state.epoch_length))
        loss = self.on_all_ranks((network,), lambda: network)

        def piece(rows: slice) -> PretrainTerms:
            terms: PretrainTerms = loss(
                network.normalise(first.images[rows]),
                network.normalise(second.images[rows]),
                first.to_source[rows],
                second.to_source[rows],
                groups[rows],
                draws,
            )
            return terms

        terms, means = self.optimise(engine, loss, len(images), piece)
        network.enqueue(torch.cat([each.keys for each in terms]), groups)
        return means
