"""Optimizers, one family per file, and their schedules. Axis names tell what each parameter is."""
