"""What becomes of each tensor: the settings, the plan, and bits chosen under a size."""
