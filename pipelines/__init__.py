"""The data half of rzen: files, pixels, object storage, the plan and Ray Data. No torch, no model."""
