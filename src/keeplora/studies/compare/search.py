"""The search of a comparison: every method tries the budget's settings on the validation splits."""

import statistics

from keeplora.evaluation.accuracy_matrix import Results
from keeplora.methods.registry import find_method, settings_of
from keeplora.progress import Track
from keeplora.studies.compare.config import CompareConfig, Settings, run_config, variations
from keeplora.studies.compare.intervals import SCORES, Trial
from keeplora.studies.compare.process_pool import Workers


def search(config: CompareConfig, workers: Workers, track: Track) -> tuple[list[Trial], dict[str, Settings]]:
    """Try the budget's settings; return all trials, and the best settings of each method that finished one."""
    budget = config.budget
    names = list(dict.fromkeys(settings_of(name) for name in config.names))
    searched = [name for name in names if find_method(name)[0].has_settings]
    rates: list[Settings] = [{"learning_rate": rate} for rate in budget.learning_rate]
    chosen: dict[str, Settings] = {name: {} for name in names if name not in searched}
    if len(rates) == 1 and not budget.search:
        return [], {name: rates[0] if name in searched else {} for name in names}
    trials = _try(
        config, [(name, rate) for name in searched for rate in rates], workers, track, "search: learning rates"
    )
    others = [
        (name, settings)
        for name in searched
        for leading in _leading(trials, name)[: budget.rates_kept]
        for settings in variations(budget, name, leading)
    ]
    others = [trial for place, trial in enumerate(others) if trial not in others[:place]]
    trials += _try(config, others, workers, track, "search: own settings")
    best = {name: found[0] for name in searched if (found := _leading(trials, name))}
    return trials, chosen | best


def scores_of(method: str, results: Results) -> dict[str, float | None]:
    """Return the metrics that mean something for the method."""
    one_by_one = find_method(method)[0].one_by_one
    return {key: results.summary()[key] if one_by_one or key == "last" else None for key in SCORES}


def _try(
    config: CompareConfig, settings: list[tuple[str, Settings]], workers: Workers, track: Track, what: str
) -> list[Trial]:
    configs = [run_config(config, name, chosen, seed=0, order=0, is_trial=True) for name, chosen in settings]
    trials = []
    for (name, chosen), run, outcome in zip(settings, configs, workers.run_all(configs, track, what), strict=True):
        if isinstance(outcome, str):
            trials.append(Trial(name, chosen, {}, None, outcome))
        else:
            scores = scores_of(run.method, outcome)
            known = [value for key in ("transfer", "average", "last") if (value := scores[key]) is not None]
            trials.append(Trial(name, chosen, scores, statistics.fmean(known)))
    return trials


def _leading(trials: list[Trial], name: str) -> list[Settings]:
    """Return a method's settings by falling mean of Transfer, Average and Last; the earlier of equal ones first."""
    finished = [trial for trial in trials if trial.method == name and trial.value is not None]
    return [trial.settings for trial in sorted(finished, key=lambda trial: -(trial.value or 0.0))]
