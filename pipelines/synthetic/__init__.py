"""The demo's corpus: images, PDFs and clips that are drawn from a seed."""
