"""What every training shares: the step MONAI's engines call, the loop, ranks, checkpoint, augmentation, prediction."""
