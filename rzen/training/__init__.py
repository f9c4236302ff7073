"""One optimizer step, the loop around it, the Ray Train worker that runs it, and its checkpoints."""
