"""The learning half of rzen: prompts, backbone, objective, training, soups, evaluation."""
