"""From a model to scores: evaluation, metrics, the accuracy matrix, remaining capacity."""
