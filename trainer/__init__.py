"""Training: configuration, the phases loop, checkpoints, and the command line."""
