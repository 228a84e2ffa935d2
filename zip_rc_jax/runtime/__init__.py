"""The machine: processes, devices, files, signals."""
