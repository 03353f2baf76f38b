"""Attribution maps of classifiers: tensors in, tensors out, signed and not normalised."""
