"""Self-supervised pre-training of the encoder: Med-MoCo, its views, and the measures of collapse."""
