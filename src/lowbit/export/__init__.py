"""export: a model in another project's format. The scheme is checked against the format before any work."""
