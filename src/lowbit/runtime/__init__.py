"""Running models: the native decoder and what is built on it."""
