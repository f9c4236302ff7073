"""One optimizer step, the loop around it on DeepSpeed, and its checkpoints. Knows no Ray."""
