"""Adapter files: what HF peft reads and writes, and MindSpore's own checkpoint beside it."""
