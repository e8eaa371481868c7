"""A check of a run before hours are spent on it."""
