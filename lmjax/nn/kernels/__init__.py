"""Attention kernels, one per file, and the table that chooses between them."""
