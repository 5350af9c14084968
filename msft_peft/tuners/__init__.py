"""The methods that work on layers: one file each."""
