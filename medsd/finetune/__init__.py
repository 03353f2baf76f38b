"""Training objectives for explanations, and the steps that MONAI's engines call."""
