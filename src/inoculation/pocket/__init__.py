"""The pocket world: a small world with known ground truth, and the base model that lives in it. See docs/pocket.md."""
