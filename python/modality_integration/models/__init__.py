"""Access to transformers models: the decoder, its hidden states, token roles, and MoCa in every decoder layer."""
