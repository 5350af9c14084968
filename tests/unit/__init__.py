"""One part of the library at a time."""
