"""The reference quantizer: turns a safetensors checkpoint into a tqformat repository.

Reading order, a room each: codes (the arithmetic of one weight), checkpoint (what comes in), planning (what becomes of each
tensor), job (executes a plan), release (tables and the card), commands; foreign is what `import` needs.
"""

__version__ = "1.0.0"
