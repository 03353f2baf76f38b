"""Maps of what a layer saw, without label or gradient: any encoder can be explained, a self-supervised one too."""

from medsd.saliency.label_free.methods import MTSM, TSM, ChannelEnergy, EigenCAM, MeanMap, MultivecEigenCAM

__all__ = ["MTSM", "TSM", "ChannelEnergy", "EigenCAM", "MeanMap", "MultivecEigenCAM"]
