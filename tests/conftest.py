"""What every test needs: a quiet, synchronous MindSpore; the two modes; the same random numbers each time."""

import atexit
import gc
import importlib.util
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

# MindSpore reads these once, when it is imported. Without launch blocking an error surfaces at the next sync, often in
# another test than its own, and PyNative is some ten times slower on CPU.
os.environ.setdefault("MS_DEV_LAUNCH_BLOCKING", "1")
os.environ.setdefault("GLOG_v", "3")
# The workers of pytest-xdist inherit this process's environment: they share its folder and leave the sweeping to it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _scratch = tempfile.mkdtemp(prefix="msft_peft_tests_")
    atexit.register(shutil.rmtree, _scratch, ignore_errors=True)
    os.environ["MS_OM_PATH"] = _scratch  # compile dumps would otherwise land in the working folder
    os.environ["HF_HOME"] = _scratch  # no test may see the cache, the settings or the token of whoever runs it
    # msrun starts a program called "python": let it be this one.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

import mindspore as ms
import numpy as np
import pytest

# Files called test_live*.py compare with HF as they run, so they import torch: without it they are not collected, and
# with it they are marked `parity`. The goldens in tests/parity need no torch and run everywhere.
collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["*/test_live*.py"]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the live parity tests, so that no file has to remember to."""
    if item.path.name.startswith("test_live"):
        item.add_marker(pytest.mark.parity)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what collection made.

    MindSpore calls it at every compilation, and to look through ten thousand tests each time was half of what a test
    in graph mode took.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_state():
    """The same seeds and PyNative mode at the start of each test, whatever the one before it did."""
    random.seed(0)
    np.random.seed(0)
    ms.set_seed(0)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture(params=["pynative", pytest.param("graph", marks=pytest.mark.graph)])
def mode(request: pytest.FixtureRequest, fresh_state: None) -> str:
    """Run the test once in each of MindSpore's modes; the value is "pynative" or "graph"."""
    if request.param == "graph":
        ms.set_context(mode=ms.GRAPH_MODE)
    return request.param
