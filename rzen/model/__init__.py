"""Backbones, adapters, checkpoints, and the model that turns encoded inputs into vectors."""
