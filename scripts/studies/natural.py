"""Natural photographs, and a network trained on ImageNet that recognises them: saliency where the answer is known.

The pictures come with scikit-image, scikit-learn and matplotlib; nothing is downloaded.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.models import SqueezeNet

from medsd.errors import WeightsError

SIDE_PX = 227
"""Side of the images that SqueezeNet 1.0 was trained on."""
_SHORT_PX = 256
# What the network was trained with: R, G, B in 0..255, less this mean, not divided.
_MEAN = (123.0, 117.0, 104.0)
# Dividing by it makes inputs about as wide as those of other networks, so that noise means the same; conv1 undoes it.
_DEVIATION = 58.0
_FIRES = {3: "fire2", 4: "fire3", 5: "fire4", 7: "fire5", 8: "fire6", 9: "fire7", 10: "fire8", 12: "fire9"}


def squeezenet(weights: Path) -> SqueezeNet:
    """SqueezeNet 1.0 (Iandola et al. 2016) of torchvision with ImageNet weights, in eval mode.

    It takes images as `normalise` gives them, (B, 3, H, W), and gives logits (B, 1000) in the usual order of the
    ImageNet classes. As in the network of its authors, and unlike torchvision's, conv10 pads by 1; a ReLU comes before
    the mean over the plane, so no logit is negative.

    Args:
        weights: npz of `conv1`, `fire2/squeeze1x1` ... `conv10`, each with `.weight` (out, in, h, w) and `.bias`,
            channels B, G, R in 0..255.

    Raises:
        WeightsError: the file is missing or not these weights.
    """
    network = SqueezeNet("1_0")
    network.classifier[1].padding = (1, 1)
    names = {"features.0": "conv1", "classifier.1": "conv10"}
    for number, fire in _FIRES.items():
        for part, stored in (("squeeze", "squeeze1x1"), ("expand1x1", "expand1x1"), ("expand3x3", "expand3x3")):
            names[f"features.{number}.{part}"] = f"{fire}/{stored}"
    try:
        with np.load(weights, allow_pickle=False) as content:
            state = {
                f"{name}.{kind}": torch.from_numpy(content[f"{stored}.{kind}"])
                for name, stored in names.items()
                for kind in ("weight", "bias")
            }
        # The mean needs no change: conv1 does not pad, so it is taken off under every tap alike.
        state["features.0.weight"] = state["features.0.weight"].flip(1) * _DEVIATION
        network.load_state_dict(state)
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(
            f"{weights}: no weights of SqueezeNet 1.0 ({reason}); give the npz that this function describes"
        ) from error
    return network.eval()


def normalise(images: Tensor) -> Tensor:
    """RGB images (B, 3, H, W) uint8 as `squeezenet` takes them: float32, 0 is the mean colour of its training."""
    return (images.to(torch.float32) - torch.tensor(_MEAN).view(1, 3, 1, 1)) / _DEVIATION


@dataclass(frozen=True)
class Natural:
    """Crops of photographs.

    Attributes:
        images: (N, 3, 227, 227) uint8 RGB.
        sources: (N,) the photograph of each crop, what a bootstrap draws.
    """

    images: Tensor
    sources: list[str]


def images() -> Natural:
    """Five crops of each photograph: the centre and the corners, once its shorter side is 256 px.

    Ten photographs (our choice), nothing drawn at random. The network names cat, espresso, tripod and moped; a rocket
    is a pole to it, and astronaut and flower are no classes of ImageNet.
    """
    from torchvision.transforms.v2 import functional as F

    crops: list[Tensor] = []
    sources: list[str] = []
    for name, pixels in _photographs().items():
        image = F.resize(torch.from_numpy(pixels).permute(2, 0, 1), [_SHORT_PX], antialias=True)
        *corners, centre = F.five_crop(image, [SIDE_PX, SIDE_PX])
        crops += [centre, *corners]
        sources += [name] * 5
    return Natural(torch.stack(crops), sources)


def _photographs() -> dict[str, npt.NDArray[np.uint8]]:
    """RGB arrays (H, W, 3); two are grey."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_image

    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        hopper = np.array(image.convert("RGB"))
    grey = {"camera": data.camera(), "coins": data.coins()}
    return {
        "chelsea": data.chelsea(),
        "coffee": data.coffee(),
        "rocket": data.rocket(),
        "astronaut": data.astronaut(),
        "motorcycle": data.stereo_motorcycle()[0],
        **{name: np.repeat(pixels[..., None], 3, axis=2) for name, pixels in grey.items()},
        "grace_hopper": hopper,
        # The arrays are read-only, which torch warns of.
        **{name: load_sample_image(f"{name}.jpg").copy() for name in ("china", "flower")},
    }
