"""What a run records about itself: metrics, goodput, progress, slow and stalled steps."""
