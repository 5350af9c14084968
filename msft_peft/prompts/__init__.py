"""The prompt methods, one file each; `discover` finds them by their METHOD."""
