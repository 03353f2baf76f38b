"""What reads the pixels of a slide file, one module a library; `choose` says which reads a file."""
