"""A seeded generator of real files (JPEG, PDF, MP4, text) with captions, for the demo and the tests."""
