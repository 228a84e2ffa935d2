"""The stages, from files to files in one run directory."""
