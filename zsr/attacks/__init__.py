"""What is maximised: the threat model, attacks and epsilon schedules."""
