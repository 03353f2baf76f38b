"""Encoders with a fully convolutional classifier, their geometry, and weights in and out."""
