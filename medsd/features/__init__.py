"""Tile features of whole slides, for slide-level models of others."""
