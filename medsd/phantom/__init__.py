"""Phantom slides: drawn from a seed, like H&E lymph nodes, with tumour whose place is known to the pixel."""

from medsd.phantom.slides import (
    Phantom,
    PhantomSpec,
    Shortcut,
    draw_phantom,
    write_phantom,
    write_phantom_dataset,
)

__all__ = ["Phantom", "PhantomSpec", "Shortcut", "draw_phantom", "write_phantom", "write_phantom_dataset"]
