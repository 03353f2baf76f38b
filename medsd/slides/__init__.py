"""A slide file becomes pixels with a place: level-0 pixels, x to the right, y down, origin at the top left."""
