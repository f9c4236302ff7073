"""Reasons for rejecting a file: every reason that a decoder may give, as reports count it."""

from __future__ import annotations

REASONS: dict[str, str] = {
    # any file
    "empty_file": "it holds no bytes",
    "too_many_bytes": "it is larger than media.max_bytes",
    "too_many_pixels": "an image or frame is larger than media.max_pixels",
    "extreme_aspect_ratio": "one edge is more than media.max_aspect_ratio times the other",
    # images
    "unsupported_format": "its first bytes are those of no image format, or of HEIF without the extra `heif`",
    "corrupt_image": "it is damaged or ends too early",
    # videos
    "corrupt_video": "it is damaged, or is not a video container",
    "truncated_video": "it ends before the time that it declares",
    "no_video_stream": "it has sound, and no moving picture",
    "too_long_video": "it is longer than media.max_video_s",
    "too_many_frames": "it has more frames than media.max_video_frames",
    "unequal_frames": "it is a folder of pictures that are not all of one size",
    "decord_unsupported": "decord would hang on it or give wrong frames; pyav decodes it",
    # documents
    "not_a_pdf": "it is another kind of file",
    "encrypted_pdf": "it needs a password",
    "corrupt_pdf": "it is damaged, ends too early, or has no page of a size",
    "too_many_pages": "it has more pages than media.max_pages",
    "no_such_page": "the page that a caption names is missing",
    "inseparable_page": "it looks different without the other pages of its file",
    # the sandbox, for all of them
    "decoder_cpu_limit": "it took more than media.max_cpu_s; the child was killed",
    "decoder_memory_limit": "it took more than media.max_memory_bytes",
    "decoder_time_limit": "the decoder did not return; the child was killed",
    "decoder_crashed": "the decoder ended the child, as pdfium does when it gets no more memory",
    "decoder_error": "the decoder failed with an unexpected error; please report it",
}
