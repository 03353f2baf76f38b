"""Many slides: what belongs to a data set, its tiles, and how they are cut and drawn."""
