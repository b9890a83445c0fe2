"""How the codes of one weight are found: rotations, codebooks, nearest levels, trellises, error feedback, and their searches.

Tensors go in, symbols and scales come out; nothing here knows of files or models.
"""
