"""Fitting: a search policy to a frozen model, and a model to reading covers."""
