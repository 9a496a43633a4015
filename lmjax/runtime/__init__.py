"""The process and its machine: other processes, files, signals, devices, chips."""
