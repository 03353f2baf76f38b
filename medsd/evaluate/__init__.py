"""Patch and slide scores with confidence intervals."""
