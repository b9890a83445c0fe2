"""What comes in: checkpoint directories, Hub ids, GGUF files and inventories, and the files beside the weights."""
