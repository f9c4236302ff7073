"""Raw data to samples: an ordinary folder of files."""
