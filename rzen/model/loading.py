"""One load of a model at a time in a process."""

from __future__ import annotations

import threading

LOADING = threading.Lock()
"""Held while transformers or PEFT makes a model.

They replace methods of classes and the default dtype of torch meanwhile. Two threads at once may leave them replaced,
and later models then have tied weights without values.
"""
