"""Measurements: each prints ratios of what ran side by side in one run, never a verdict."""
