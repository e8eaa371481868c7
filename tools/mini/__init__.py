"""Build the embedded model and benchmark: sources, drawings, tasks, pre-training, export."""
