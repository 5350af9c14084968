import importlib.util
import os
import tempfile

# MindFormers writes a log into the working folder otherwise.
os.environ.setdefault("LOG_MF_PATH", os.environ.get("MS_OM_PATH", tempfile.gettempdir()))

# Each host is installed by its own target of the Makefile. MindPet's folder has half of MindFormers.
_HOSTS = {
    "test_mindformers*.py": ("mindformers", "datasets"),
    "test_mindone*.py": ("mindone", "transformers"),
    "test_mindnlp*.py": ("mindnlp", "mindtorch"),
}
collect_ignore_glob = [
    pattern
    for pattern, packages in _HOSTS.items()
    if any(importlib.util.find_spec(package) is None for package in packages)
]
