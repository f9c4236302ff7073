"""Encoding: decoded inputs become token ids, patches and positions."""
