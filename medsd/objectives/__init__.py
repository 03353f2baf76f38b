"""Losses for explanations: SaliencyDecor, AIM, decorrelation, masking."""
