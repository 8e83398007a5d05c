"""What transformers' models are asked for: their decoder, hidden states, token roles, and a place for MoCa."""
