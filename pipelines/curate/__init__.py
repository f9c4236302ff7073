"""Which samples of a dataset are left out of training, and why. The shards never change."""
