"""Methods fitted to a checkpoint's own queries, keys and values."""
