"""Patch, TunerLayer, target matching and injection: what every method shares."""
