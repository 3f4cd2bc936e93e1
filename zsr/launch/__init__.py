"""Runs and sweeps on a Ray cluster: the only room that knows Ray and Optuna."""
