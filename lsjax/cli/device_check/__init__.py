"""Checks a device's results against float64 and times it, with one process per phase."""
