"""Tasks, metrics, one runner and one report: how far a model reads, with dense attention always beside."""
