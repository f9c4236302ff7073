"""Export a model: merged weights, the files that other libraries need, and the model card."""
