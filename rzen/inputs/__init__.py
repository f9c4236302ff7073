"""From decoded inputs to token ids, patches and positions."""
