"""What a model's weights mean to it, seen on text: tokens, the walk through the blocks, gradients, sensitivities."""
