"""Layers, attention, positions, experts, and the stack that runs them."""
