"""The target layers of a model: adapters, statistics, and what is borrowed from modules."""
