"""Pruning methods side by side."""
