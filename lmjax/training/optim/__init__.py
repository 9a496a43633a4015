"""Optimizers, one kind per file, and their schedules, told what a parameter is by its axis names."""
