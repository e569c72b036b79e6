"""Make a language model smaller without losing what it knows, on the GPUs you have."""
