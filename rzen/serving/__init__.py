"""A server's requests, queue and engine, without a web server: what `rzen serve` runs."""
