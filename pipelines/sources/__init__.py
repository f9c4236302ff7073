"""Raw layouts turned into samples: one function per layout, each yielding `RawSample`."""
