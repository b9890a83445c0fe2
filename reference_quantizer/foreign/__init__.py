"""Low-bit checkpoints of other programs, whose values go into a repository as they are: one file a format."""
