"""The training loop and what it stands on: optimizer, collectives, checkpoints, quick evaluation."""
