"""The encoder goes on to segmentation: networks of segmentation-models-pytorch, images with masks."""
