"""The properties that every method has, over every case and in both modes."""
