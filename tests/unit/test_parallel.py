"""Two workers under msrun end with the same adapter, to the bit, and with the one that a single process makes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from msft_peft import LoraConfig, PeftModel, get_peft_model
from msft_peft.parallel import require_equal_adapters
from tests import nets
from tests.cases import weights_of

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "data_parallel.py"


def run(command: list, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def on_two_workers(script: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    msrun = Path(sys.executable).parent / "msrun"
    workers = ["--worker_num=2", "--local_worker_num=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    return run([msrun, *workers, f"--log_dir={folder / 'log'}", "--join=True", script, *arguments], folder)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--compiled",)], ids=["pynative", "compiled"])
def test_two_workers_and_one_make_the_same_adapter(options: tuple[str, ...], tmp_path: Path):
    two = on_two_workers(EXAMPLE, tmp_path, "--output", "two", *options)
    assert two.returncode == 0, two.stdout + two.stderr
    one = run([sys.executable, EXAMPLE, "--output", "one"], tmp_path)
    assert one.returncode == 0, one.stdout + one.stderr
    name = "adapter_model.safetensors"
    saved, *of_workers = (
        (tmp_path / "two" / part / name).read_bytes() for part in (".", "of-worker-0", "of-worker-1")
    )
    assert of_workers == [saved, saved]
    alone, together = (safetensors.numpy.load_file(tmp_path / which / name) for which in ("one", "two"))
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        # Adam divides by the gradients' size: where those are tiny their rounding shows.
        np.testing.assert_allclose(together[key], value, atol=2e-4, rtol=1e-3, err_msg=key)
    assert any(np.abs(value).max() > 1e-2 for key, value in alone.items() if "lora_B" in key)


@pytest.mark.slow
def test_workers_that_begin_apart_are_told(tmp_path: Path):
    script = tmp_path / "apart.py"
    script.write_text(
        EXAMPLE.read_text(encoding="utf-8").replace("ms.set_seed(0)", "ms.set_seed(1 + get_rank())"), encoding="utf-8"
    )
    found = on_two_workers(script, tmp_path, "--output", "out")
    logs = "".join(path.read_text(errors="replace") for path in (tmp_path / "log").glob("worker_*.log"))
    assert found.returncode != 0
    assert "does not hold the same trainable parameters as the workers" in logs
    assert not (tmp_path / "out").exists()


def test_alone_there_is_nothing_to_compare():
    require_equal_adapters(get_peft_model(nets.Dense(), LoraConfig(target_modules=["lin0"])))


SAVER = """
import itertools, sys
import numpy as np
from mindspore import Tensor
from msft_peft import LoraConfig, get_peft_model
from tests import nets
model = get_peft_model(nets.Dense(), LoraConfig(r=512, target_modules=["lin0", "lin1"]))
for number in itertools.count(1):
    for p in model.trainable_params():
        p.copy_(Tensor(np.full(p.shape, number, np.float32)))
    model.save_pretrained(sys.argv[1])
    print(number, flush=True)
"""


def test_a_worker_killed_while_it_saves_leaves_whole_files(tmp_path: Path):
    """Each file is the old one or the new one: all its numbers are of one save."""
    script = tmp_path / "saver.py"
    script.write_text(SAVER, encoding="utf-8")
    command = [sys.executable, script, tmp_path / "adapter"]
    for delay in (0.0, 0.003, 0.011):
        saver = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
        assert saver.stdout is not None
        for _ in range(3):
            saver.stdout.readline()
        time.sleep(delay)
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        saver.stdout.close()
        arrays = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        numbers = {float(number) for array in arrays.values() for number in np.unique(array)}
        assert len(numbers) == 1
        assert numbers.pop() >= 3
        PeftModel.from_pretrained(nets.Dense(), tmp_path / "adapter")
        (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
        model = PeftModel.from_pretrained(nets.Dense(), tmp_path / "adapter")  # from the checkpoint beside
        assert len({float(number) for p in weights_of(model, "default") for number in np.unique(p.asnumpy())}) == 1
