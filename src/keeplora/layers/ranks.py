"""What happens where a layer has fewer directions than the rank: it takes what there is, and a warning says so."""

import logging

logger = logging.getLogger(__name__)


def alphas_for(ranks: dict[str, int], alpha: float, rank: int) -> dict[str, float]:
    """Return each layer's alpha, so that alpha / rank is the same where a rank had to shrink."""
    return {name: alpha * found / rank for name, found in ranks.items()}


def warn_of_small_ranks(ranks: dict[str, int], rank: int, task: str) -> None:
    """Name the layers that have no room for the rank, and those that have none at all; 0 means that."""
    smaller = [f"{name} ({found})" for name, found in ranks.items() if 0 < found < rank]
    left_alone = [name for name, found in ranks.items() if found == 0]
    if smaller:
        logger.warning(
            "task %r: %d of %d layers have fewer directions to learn with than rank %d, and take these: %s",
            task, len(smaller), len(ranks), rank, ", ".join(smaller),
        )  # fmt: skip
    if left_alone:
        logger.warning(
            "task %r: %d of %d layers have no residual direction left and are left alone: %s",
            task, len(left_alone), len(ranks), ", ".join(left_alone),
        )  # fmt: skip
