"""What is done at test time. The room is built; its first defence, TTC, is still to move in."""
