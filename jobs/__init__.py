"""What one submits: typed YAML specs, one handler per kind, and the command line."""
