"""A slide read in a child process: a decoder that dies, hangs or takes all memory costs that process only."""
