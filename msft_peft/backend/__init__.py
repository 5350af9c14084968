"""The only package that knows MindSpore's quirks: compiled graphs, names, dtypes, in-place writes, kernels."""
