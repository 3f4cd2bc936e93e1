"""What is done at test time: defences that change an image before it is classified."""
