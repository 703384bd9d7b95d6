"""The command line: `latentmas run`, `serve` and `doctor`."""
