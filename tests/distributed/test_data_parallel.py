"""Two workers under msrun, on this machine's CPU: the example, and what keeps workers together."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy

from msft_peft import LoraConfig, PeftModel, get_peft_model
from msft_peft.distributed import broadcast_adapter, check_equal_adapters
from msft_peft.errors import ConfigError
from tests import nets
from tests.cases import shake, weights_of
from tests.tolerances import array, assert_same, differ

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests/distributed/worker.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """A command that runs meanwhile; `output` waits for it."""

    def __init__(self, command: list, folder: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MS_WORKER")}
        self.folder = folder
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env=environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, limit: int) -> None:
        """A failed or hanging command fails the test, with what the workers said."""
        try:
            output, _ = self.process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # msrun's workers are in its group
            output, _ = self.process.communicate()
        logs = "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("log/worker_*.log")))
        assert self.process.returncode == 0, f"{output}\n{logs}"


@pytest.mark.slow
def test_two_workers(tmp_path: Path):
    # One test, since pytest-xdist would share several among processes, each of which would start workers of its own.
    msrun = ["msrun", "--worker_num=2", "--local_worker_num=2", "--master_addr=127.0.0.1", "--join=True"]
    jobs = [
        Job([*msrun, f"--master_port={free_port()}", f"--log_dir={tmp_path / 'log'}", WORKER, tmp_path], tmp_path),
        Job([sys.executable, WORKER, tmp_path], tmp_path),
    ]
    for job in jobs:
        job.finish(240)
    for compiled in (True, False):
        trained_alike(tmp_path, compiled)
        rank_0_saved(tmp_path, compiled)
    found_together(tmp_path)
    # What must be refused, and that the root's bits arrive in every dtype, the workers have asserted themselves.
    first, second = np.load(tmp_path / "rank_0_other.npz"), np.load(tmp_path / "rank_1_other.npz")
    for name in first.files:
        assert_same(first[name], second[name], "exact")


def trained_alike(folder: Path, compiled: bool) -> None:
    """The two workers have one adapter, and it is that of one worker on the joined batches."""
    first, second, alone = (np.load(folder / f"{name}_{compiled}.npz") for name in ("rank_0", "rank_1", "alone"))
    assert set(first.files) == set(second.files) == set(alone.files)
    for name in first.files:
        assert_same(second[name], first[name], "exact")
        assert_same(first[name], alone[name], "workers")
    # The adapter has moved by far more than that.
    assert any(np.abs(first[name]).max() > 0.02 for name in first.files if "lora_B" in name)


def found_together(folder: Path) -> None:
    """EVA's components are those of one worker on the joined batches."""
    first, second, alone = (np.load(folder / f"{name}_eva.npz") for name in ("rank_0", "rank_1", "alone"))
    assert set(first.files) == set(second.files) == set(alone.files)
    for name in first.files:
        assert_same(second[name], first[name], "exact")
        np.testing.assert_allclose(first[name], alone[name], atol=1e-4)


def rank_0_saved(folder: Path, compiled: bool) -> None:
    """One adapter on disk, the one that worker 1 has too."""
    adapter, saved = np.load(folder / f"rank_1_{compiled}.npz"), folder / f"saved_by_2_{compiled}"
    names = {path.name for path in saved.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.ckpt", "adapter_model.safetensors"}
    tensors = safetensors.numpy.load_file(saved / "adapter_model.safetensors")
    assert {key.replace(".weight", ".default.weight"): value.tobytes() for key, value in tensors.items()} == {
        name: adapter[name].tobytes() for name in adapter.files
    }


def test_the_page_shows_the_example():
    """The code on the page is the code that these tests run."""
    page = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
    example = (ROOT / "examples/data_parallel.py").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) > 2
    for block in blocks:
        assert block in example, block


def test_one_worker_agrees_with_itself():
    model = get_peft_model(nets.Dense(), LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False))
    before = {p.name: array(p) for p in model.get_parameters()}
    broadcast_adapter(model)
    check_equal_adapters(model)
    for p in model.get_parameters():
        assert_same(p, before[p.name], "exact")


def test_what_cannot_be_sent_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="has no adapters"):
        check_equal_adapters(nets.Dense())
    with pytest.raises(ConfigError, match="has no adapters"):
        broadcast_adapter(nets.Dense())
    model = get_peft_model(nets.Dense(), LoraConfig(r=2, target_modules=["lin0"]))
    with pytest.raises(ConfigError, match="root=1 is none of the 1 workers"):
        broadcast_adapter(model, root=1)
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    for function in (broadcast_adapter, check_equal_adapters):
        with pytest.raises(RuntimeError, match="init"):
            function(model)
    monkeypatch.delenv("MS_WORKER_NUM")
    changed = get_peft_model(nets.Dense(), LoraConfig(r=2, target_modules=["lin0"], init_lora_weights="pissa"))
    with pytest.raises(ConfigError, match="out of the base weights"):
        broadcast_adapter(changed)


KILLED = """
import os, signal, sys
import mindspore as ms
import safetensors.numpy
from msft_peft import PeftModel
from tests import nets
from tests.cases import shake

folder, victim = sys.argv[1:]
ms.set_seed(0)
model = PeftModel.from_pretrained(nets.Dense(), folder)
shake([p for p in model.get_parameters() if "lora" in p.name], seed=9)


def die_half_way(write):
    def half(first, second, *args, **kwargs):
        write(first, second, *args, **kwargs)
        path = second if victim == "safetensors" else first
        data = open(path, "rb").read()
        os.chmod(path, 0o600)
        open(path, "wb").write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    return half


if victim == "safetensors":
    safetensors.numpy.save_file = die_half_way(safetensors.numpy.save_file)
else:
    save = ms.save_checkpoint
    ms.save_checkpoint = lambda obj, path, **kwargs: die_half_way(lambda p, o: save(o, p, **kwargs))(path, obj)
model.save_pretrained(folder)
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["safetensors", "ckpt"])
def test_a_worker_that_is_killed_while_it_saves_leaves_whole_files(victim: str, tmp_path: Path):

    ms.set_seed(0)
    model = get_peft_model(nets.Dense(), LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    shake(weights_of(model, "default"))
    model.save_pretrained(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    died = subprocess.run([sys.executable, script, tmp_path / "adapter", victim], env=environment, timeout=120)
    assert died.returncode == -9
    # What was being written lies in a folder of its own; the adapter's files change all together, or not at all.
    after = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir() if path.is_file()}
    assert after == before
    ms.set_seed(0)
    loaded = PeftModel.from_pretrained(nets.Dense(), tmp_path / "adapter")
    assert not differ(loaded(loaded.sample()), model(model.sample()))
