"""From the plan to batches: a reader without Ray, and the same on Ray Data."""
