"""What can go wrong that is nobody's mistake in the code."""


class LearningError(ValueError):
    """A task could not be learned with these settings: training diverged, or nothing is left to learn with."""


class InUseError(ValueError):
    """Another process writes to the folder."""
