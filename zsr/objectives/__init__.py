"""What is minimised: one file for each published method; writing the file registers it."""
