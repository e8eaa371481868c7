"""Model families: how to load one, make tasks for it, and save it."""
