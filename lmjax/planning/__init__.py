"""What a run would need on a TPU: its real step, compiled without one."""
