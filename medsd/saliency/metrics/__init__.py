"""How good attribution maps are: tensors in, one number an image out, so that intervals can be drawn over images."""
