"""Attention, one file a kernel."""
