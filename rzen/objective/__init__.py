"""The training objective: a batch, terms that compose, a tiled engine, and the gather across ranks."""
