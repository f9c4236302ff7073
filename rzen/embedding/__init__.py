"""Models for Python users: inputs of any kind to vectors, and search in what `rzen embed` wrote."""
