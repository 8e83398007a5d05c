"""MIR while a model trains: a measurement for any loop, callbacks for transformers' Trainer and for Lightning."""
