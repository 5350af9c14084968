"""A process that is killed while it saves, and two that save at once: the folder holds one adapter, whole."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from msft_peft import LoraConfig, PeftModel, get_peft_model
from tests import nets

ROOT = Path(__file__).parents[2]

# Saves adapter `seed` once for each number of file operations n, and dies before the n-th of them.
KILLED = """
import os, shutil, sys
from tests.unit.test_killed import adapted
old, work, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = adapted(seed)
EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod")
limit, count, armed = 0, 0, False

def watch(event, arguments):
    global count
    if armed and event in EVENTS and work in str(arguments[0]):
        count += 1
        if count == limit:
            os._exit(9)

sys.addaudithook(watch)
while True:
    limit += 1
    folder = os.path.join(work, str(limit))
    shutil.copytree(old, folder)
    child = os.fork()
    if child == 0:
        armed = True
        model.save_pretrained(folder)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""
SAVING = """
import sys
from tests.unit.test_killed import adapted
model = adapted(int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(40):
    model.save_pretrained(sys.argv[1])
"""


def adapted(seed: int) -> PeftModel:
    """An adapter that its files tell from others: by every weight, and by the config."""
    config = LoraConfig(r=2, lora_alpha=seed, target_modules=["q"])
    model = get_peft_model(nets.Blocks(), config)
    for p in model.trainable_params():
        p.set_data(nets.ms.Tensor(np.full(p.shape, seed, np.float32)))
    return model


def which(folder: Path) -> int:
    """The seed of the adapter in a folder, which must be one and the same in every file."""
    model = PeftModel.from_pretrained(nets.Blocks(), folder)
    values = {float(x) for p in model.get_parameters() if "lora_" in p.name for x in p.asnumpy().ravel()}
    assert values == {float(model.peft_config["default"].lora_alpha)}
    (folder / "adapter_model.safetensors").unlink()  # the other format must tell the same
    other = PeftModel.from_pretrained(nets.Blocks(), folder)
    assert {float(x) for p in other.get_parameters() if "lora_" in p.name for x in p.asnumpy().ravel()} == values
    return int(values.pop())


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "GLOG_v": "3"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_killed_while_saving(tmp_path: Path):
    adapted(1).save_pretrained(tmp_path / "old")
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "old"), str(tmp_path / "work"), "2"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "work").iterdir(), key=lambda path: int(path.name))
    found = [which(folder) for folder in folders]
    assert len(found) > 12
    assert found == sorted(found)  # the old one, up to a moment, and from then on the new one
    assert set(found) == {1, 2}
    assert found.count(2) >= 4  # so that a folder was cut short while its files were moved


def test_what_was_left_is_saved_over(tmp_path: Path):
    for folder in ("one", "two"):
        adapted(1).save_pretrained(tmp_path / folder)
    pending = tmp_path / "one" / ".msft_peft-new"
    pending.mkdir()
    shutil.copy(tmp_path / "two" / "adapter_config.json", pending)
    adapted(3).save_pretrained(tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    assert which(tmp_path / "one") == 3


def test_what_killed_processes_left_goes_after_a_day(tmp_path: Path):
    ages = {".msft_peft-old": 25 * 3600, ".msft_peft-young": 3600}
    for name, age in ages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"half of i")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    adapted(1).save_pretrained(tmp_path)
    assert [name for name in ages if (tmp_path / name).exists()] == [".msft_peft-young"]


def test_a_failed_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapted(1).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    model = adapted(2)
    for function in ("mindspore.save_checkpoint", "safetensors.numpy.save_file", "os.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(function, full)
            with pytest.raises(OSError, match="No space left"):
                model.save_pretrained(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs the rights of Unix")
def test_a_folder_that_may_only_be_read(tmp_path: Path):
    folder = tmp_path / "adapter"
    adapted(1).save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model, root = adapted(2), os.geteuid() == 0
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for parent in [tmp_path, *tmp_path.parents] if root else []:
        if "pytest" in str(parent):  # pytest's folders are its user's alone
            parent.chmod(0o755)
    if root:
        os.seteuid(65534)  # nobody: root may write everywhere
    try:
        with pytest.raises(PermissionError, match="adapter"):
            model.save_pretrained(folder)
        # It still loads, also where an earlier process left a finished set of files to be moved.
        values = {
            float(x)
            for p in PeftModel.from_pretrained(nets.Blocks(), folder).get_parameters()
            if "lora_" in p.name
            for x in p.asnumpy().ravel()
        }
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
    assert values == {1.0}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_two_processes_saving_at_once(tmp_path: Path):
    command = [sys.executable, "-c", SAVING, str(tmp_path / "adapter")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, seed], env=environment(), cwd=tmp_path, **pipes) for seed in ("1", "2")]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    names = {"README.md", "adapter_config.json", "adapter_model.ckpt", "adapter_model.safetensors"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == names
    assert which(tmp_path / "adapter") in (1, 2)


def test_a_file_that_no_longer_belongs_goes(tmp_path: Path):
    """The network of an earlier P-tuning adapter would not fit the adapter that is saved in its place."""
    (tmp_path / "prompt_encoder.safetensors").write_bytes(b"of another adapter")
    adapted(1).save_pretrained(tmp_path)
    assert not (tmp_path / "prompt_encoder.safetensors").exists()
    assert which(tmp_path) == 1
