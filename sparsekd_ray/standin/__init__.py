"""A small model of a real architecture, trained on the spot."""
