"""The command line, strict runs of notebooks, the page of a run and the explorer."""
