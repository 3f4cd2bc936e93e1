"""Measurements of zsr itself: what a step costs, against what the official loops do and what the machine could."""
