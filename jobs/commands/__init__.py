"""Commands of `rzen`, grouped by what they work on. Each turns its arguments into a spec or a call, and no more."""
