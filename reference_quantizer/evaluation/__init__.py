"""A repository against its base: windows, metrics, samples."""
