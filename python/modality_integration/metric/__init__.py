"""The Modality Integration Rate of tensors: features in memory, hidden states that pass by, hidden states in files."""

MODALITIES = ("vision", "text")
