"""The ``zsr`` command. Modules here import nothing heavy: torch and Ray are loaded inside the command that needs them.

One module a command; main.py gathers them and turns mistakes into sentences.
"""
