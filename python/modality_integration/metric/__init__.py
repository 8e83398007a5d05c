"""MIR from tensors: features in memory, streamed hidden states, or hidden states in files."""

MODALITIES = ("vision", "text")
