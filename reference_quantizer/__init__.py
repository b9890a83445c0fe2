"""The reference quantizer: turns a safetensors checkpoint into a tqformat repository.

Reading order: codebook -> rotation -> encode (the arithmetic of one row chunk), source -> support -> plan (what the
checkpoint holds and what becomes of each tensor), quantize (executes the plan), report (tables), __main__ (commands).
"""

__version__ = "1.0.0"
