"""Attribution maps of classifiers: tensors in, tensors out, signed and not normalised."""

CAPTUM = "captum."
"""What stands before the name of an attribution of captum, where methods are named."""
