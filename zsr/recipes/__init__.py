"""Recipes that rebuild what the repository ships: the emoji shards and the small CLIP trained on them.

Nothing in the library imports this room. It may use packages that a user of zsr does not need (each script's docstring pins
them), because it runs once, when the embedded data or weights are made anew, and not when they are used.
"""
