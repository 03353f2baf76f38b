"""Files of surrogates (Smooth Deep Saliency, variant A), each bound to the weights of the classifier it belongs to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from medsd.errors import WeightsError
from medsd.networks.weights import read_tensors, save_tensors, unreadable_card
from medsd.saliency.smooth import Also, Surrogate

SURROGATE_FORMAT = "medsd-surrogate-1"


@dataclass(frozen=True)
class SurrogateCard:
    """What a file of surrogates says of itself.

    Attributes:
        encoder: timm name of the classifier's encoder.
        weights_sha256: of the classifier's weights and card, as `load_classifier` gives it.
        channels: of the input and output of each replaced module, by its name in the classifier, in module order.
        also: kinds of modules beside convolutions of stride 2.
        relative_l1: error of each surrogate by the same names, see `PointError`; None where it has no value.
        settings: what they were trained with.
    """

    encoder: str
    weights_sha256: str
    channels: dict[str, tuple[int, int]]
    also: tuple[Also, ...]
    relative_l1: dict[str, float | None]
    settings: dict[str, Any]


def save_surrogate(path: str | Path, surrogate: Surrogate, card: SurrogateCard) -> str:
    """Write surrogates and card as safetensors, atomically; returns the SHA-256 of both.

    Raises:
        WeightsError: the card is that of other surrogates.
        OutputError: the file cannot be written.
    """
    if (card.channels, card.also) != (surrogate.channels, surrogate.also):
        raise WeightsError(f"{path}: the card is that of surrogates of {list(card.channels)}; describe these")
    return save_tensors(path, surrogate.state_dict(), SURROGATE_FORMAT, asdict(card))


def load_surrogate(
    path: str | Path, weights_sha256: str, device: torch.device | str = "cpu"
) -> tuple[Surrogate, SurrogateCard]:
    """The surrogates of the classifier with these weights, frozen, and their card.

    Args:
        path: what `save_surrogate` wrote.
        weights_sha256: of the classifier, as `load_classifier` gives it.
        device: where they shall be.

    Raises:
        WeightsError: no such file, not one of surrogates, damaged, or it belongs to other weights.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file of surrogates; run the stage 'surrogate' or check the path")
    file = read_tensors(path)
    if file.kind != SURROGATE_FORMAT:
        raise WeightsError(f"{path}: holds no surrogates ('{SURROGATE_FORMAT}' is not in its metadata); check the path")
    card = _card(path, file.card)
    if card.weights_sha256 != weights_sha256:
        raise WeightsError(
            f"{path}: surrogates of other weights ({card.encoder}, {card.weights_sha256[:12]}, not "
            f"{weights_sha256[:12]}); run the stage 'surrogate' again"
        )
    try:
        # The card is not trusted: no memory is taken for what the file does not hold.
        with torch.device("meta"):
            surrogate = Surrogate(card.channels, card.also)
        surrogate.load_state_dict(file.state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{path}: its tensors are not what its card says ({reason}); train again") from error
    return surrogate.requires_grad_(False).to(device).eval(), card


def _card(path: Path, fields: dict[str, Any]) -> SurrogateCard:
    try:
        channels = {name: (int(given), int(made)) for name, (given, made) in fields["channels"].items()}
        return SurrogateCard(**{**fields, "also": tuple(fields["also"]), "channels": channels})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable_card(path, error) from error
