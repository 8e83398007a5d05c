"""MIR during training: a measurement for any training loop, and callbacks for transformers' Trainer and Lightning."""
