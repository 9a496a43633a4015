"""Training: the recipe, the step, its state, checkpoints and the loop."""
