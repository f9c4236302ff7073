"""Jobs that make candidate tables: hard negatives of each sample, mined, chosen and clustered."""
