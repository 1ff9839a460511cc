"""Analyses of the paper's section 5.3 and of our own: each reads records or models and returns tidy tables."""
