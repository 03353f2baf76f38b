"""A slide and a classifier become slide-level maps, contours, an overlay and a report."""
