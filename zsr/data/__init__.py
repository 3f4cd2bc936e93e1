"""Images and labels: shards, their index, the order they are read in, and batches of uint8 pixels."""
