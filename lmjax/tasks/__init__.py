"""What a model is fine-tuned for: examples, heads, losses, predictions and metrics of tasks."""
