"""Self-supervised pre-training of the encoder (Med-MoCo): the stage between prepare and finetune, not built yet."""
