"""Writes tests/goldens with HF peft on torch: `python -m tests.parity.make_goldens`, by hand, from the root folder.

Each folder <method>/<case> is what HF's `save_pretrained` wrote, and io.npz: the base model's weights ("weight/..."),
a batch ("x", "target"), and what HF makes of it: "output", "loss", "gradient/...", "merged_output" and, where they
differ from the base model's, "merged/...". MANIFEST.json has the versions, and each file's sha256.
"""

import hashlib
import json
import platform
import shutil
import tempfile
from pathlib import Path

import numpy as np
import peft
import safetensors
import torch
import transformers

from . import theirs
from .cases import ALL_CASES, Case
from .ours import config_in

GOLDENS = Path(__file__).parent.parent / "goldens"
LARGEST = 20_000


def write(case: Case, folder: Path) -> None:
    """Write the golden of one case."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        weights, x, target, found = theirs.write(case, Path(scratch))
        shutil.copy(Path(scratch) / "adapter_model.safetensors", folder)
        fields = json.loads((Path(scratch) / "adapter_config.json").read_text())
        # HF's sets come in another order each time; the golden should not.
        fields |= {key: value for key, value in config_in(Path(scratch)).items() if isinstance(value, list)}
        (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2, sort_keys=True))
    arrays = {"x": x, "target": target, "output": found.output, "loss": np.float32(found.loss)}
    arrays |= {"counts": np.array([found.trainable, found.total]), "text": np.array(found.text)}
    arrays |= {f"weight/{key}": value for key, value in weights.items()}
    arrays |= {f"gradient/{key}": value for key, value in found.gradients.items()}
    if case.merges:
        changed = {key: value for key, value in found.merged.items() if not np.array_equal(value, weights[key])}
        arrays |= {"merged_output": found.merged_output} | {f"merged/{key}": value for key, value in changed.items()}
    np.savez_compressed(folder / "io.npz", **arrays)


def main() -> None:
    shutil.rmtree(GOLDENS, ignore_errors=True)
    for case in ALL_CASES.values():
        write(case, GOLDENS / case.method.lower() / case.name)
    files = sorted(path for path in GOLDENS.rglob("*") if path.is_file())
    large = [str(path) for path in files if path.stat().st_size > LARGEST]
    assert not large, f"larger than {LARGEST} bytes: {large}"
    versions = {module.__name__: module.__version__ for module in (peft, torch, transformers, safetensors, np)}
    manifest = {
        "versions": versions | {"python": platform.python_version()},
        "sha256": {str(p.relative_to(GOLDENS)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }
    (GOLDENS / "MANIFEST.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    print(f"{len(ALL_CASES)} goldens, {sum(path.stat().st_size for path in files):,} bytes")


if __name__ == "__main__":
    main()
