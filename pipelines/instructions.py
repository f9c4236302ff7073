"""The tasks that rzen names, each with the instructions of its queries and of its targets, as MMEB-V2 words them.

A sample of a folder has the instructions of its task, unless its list gives another. `Embedder.encode` knows the names.
"""

from __future__ import annotations

from pipelines.samples import Modality

INSTRUCTIONS: dict[str, tuple[str, str]] = {
    "text_image": ("Find an image that matches the given caption:", "Understand the content of the provided image."),
    "text_page": (
        "Find a document image that matches the given query:",
        "Understand the content of the provided document image.",
    ),
    "text_video": (
        "Find the clip that corresponds to the given text:",
        "Understand the content of the provided video clip.",
    ),
    "image_text_image": (
        "Given an image, find a similar image with the described changes:",
        "Understand the content of the provided image.",
    ),
    "text_text": ("Find a text that matches the given query:", ""),
    "image_class": ("Represent the given image for classification.", ""),
}
"""Task -> instruction of the query, instruction of the targets."""
TARGETS: dict[str, Modality] = {
    "text_image": "image",
    "text_page": "page",
    "text_video": "video",
    "image_text_image": "image",
    "text_text": "text",
    "image_class": "text",
}
"""Task -> modality of its targets."""
