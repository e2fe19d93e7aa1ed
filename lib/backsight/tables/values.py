"""The columns that every table of values has; nothing is imported here, so that a reader of names starts at once."""

# The tidy table of every run, in this order; a study adds columns of its own behind them.
METRIC_COLUMNS = (
    "target",
    "weights",
    "dataset",
    "split",
    "tap",
    "depth",
    "inverse",
    "measure",
    "value",
    "low",
    "high",
    "n",
    "seed",
)
