"""Bytes to uint8 pixels: images, video frames, document pages. Pure functions without Ray."""
