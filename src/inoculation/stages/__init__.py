"""The stages of the pipelines, one a module: each declares what it reads and writes, and gets nothing else (`stage`)."""
