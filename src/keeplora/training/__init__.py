"""One task's optimisation, and the checkpoints it resumes from."""
