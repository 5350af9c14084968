"""Text generation."""


class GenerationMixin:
    """`generate` for models with scores over the vocabulary."""
