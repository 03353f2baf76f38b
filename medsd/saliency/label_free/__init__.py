"""Maps of what a layer saw, without label or gradient: any encoder can be explained, a self-supervised one too."""

from medsd.saliency.label_free.maps import channel_energy, eigencam, mean_map, mtsm, multivec_eigencam, tsm
from medsd.saliency.label_free.methods import LabelFree, activations

__all__ = ["LabelFree", "activations", "channel_energy", "eigencam", "mean_map", "mtsm", "multivec_eigencam", "tsm"]
