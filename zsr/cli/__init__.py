"""The ``zsr`` command. Modules here import nothing heavy: torch and Ray are loaded inside the command that needs them."""
