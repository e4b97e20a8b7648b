"""Measurements: speed and memory as ratios within one run, quality over many seeds."""
