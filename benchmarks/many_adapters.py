"""Many adapters on one model: mixed batches, switching, hot swapping, adding and deleting, merging; beside HF peft.

Both libraries have the same names, so that what is measured stands here once, over a `Side` for each of them. Every
part of every contender is a process of its own, and they run in turn, round after round. The adapters are the same
files, and the logits of the mixed batch are compared before anything is reported.

    python -m benchmarks many_adapters [--rounds 3]
"""

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lora_step import CONTENDERS, MODELS, THREADS, batch, seconds_of, timed

ADAPTERS, CROWD, RANK, WIDTH = 8, 100, 8, 2048
TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
NAMES = [f"a{i}" for i in range(ADAPTERS)]


class Torch:
    """HF peft and transformers."""

    def __init__(self) -> None:
        import peft
        import torch
        import transformers
        from peft.utils import hotswap

        torch.set_num_threads(THREADS)
        torch.set_grad_enabled(False)
        self.torch, self.peft, self.hotswap, self.auto = torch, peft, hotswap, transformers.AutoModelForCausalLM
        self.repeats = 5

    def array(self, ids: np.ndarray) -> Any:
        return self.torch.from_numpy(ids).long()

    def forward(self, model: Any, ids: Any, **names: Any) -> np.ndarray:
        return model(ids, **names)["logits"].numpy()

    def logits_alone(self, model: Any) -> Callable[[Any], np.ndarray]:
        return lambda ids: self.forward(model, ids)

    def weights(self, path: Path) -> dict[str, Any]:
        """An adapter as its `hotswap_adapter_from_state_dict` wants it: with the name of the one in the model."""
        found = self.peft.load_peft_weights(path)
        return {key.replace(".weight", f".{NAMES[0]}.weight"): value for key, value in found.items()}

    def product(self, rank: int) -> Callable[[], Any]:
        b, a = self.torch.rand(WIDTH, rank), self.torch.rand(rank, WIDTH)
        return lambda: b @ a

    def dense(self) -> Any:
        net = self.torch.nn.Sequential(self.torch.nn.Linear(WIDTH, WIDTH, bias=False))
        return net.eval()

    def compiled(self) -> int:
        return 0


class MindSpore:
    """This library, its models in graph mode or PyNative."""

    def __init__(self, graph: bool) -> None:
        os.environ["GLOG_v"] = "3"
        if not graph:
            os.environ["MS_DEV_LAUNCH_BLOCKING"] = (
                "1"  # PyNative's asynchronous default is several times slower on CPU
            )
        import mindspore as ms

        import msft_peft
        from msft_peft import models
        from msft_peft.backend.graphs import compiled_count

        ms.set_context(mode=ms.GRAPH_MODE if graph else ms.PYNATIVE_MODE)
        self.ms, self.peft, self.hotswap, self.auto = ms, msft_peft, msft_peft, models.AutoModelForCausalLM
        self.compiled, self.graph = compiled_count, graph
        self.repeats = 2 if graph else 5  # of what compiles anew

    def array(self, ids: np.ndarray) -> Any:
        return self.ms.Tensor(ids)

    def forward(self, model: Any, ids: Any, **names: Any) -> np.ndarray:
        return model(ids, **names)["logits"].asnumpy()

    def logits_alone(self, model: Any) -> Callable[[Any], np.ndarray]:
        """A forward that returns no dict: MindSpore fails to link such a graph where scalings are live."""

        def logits(ids: Any) -> Any:
            return model(ids)["logits"]

        run = self.ms.jit(logits) if self.graph else logits
        return lambda ids: run(ids).asnumpy()

    def weights(self, path: Path) -> dict[str, Any]:
        return self.peft.load_peft_weights(path)

    def product(self, rank: int) -> Callable[[], Any]:
        b, a = (self.ms.Tensor(np.random.rand(*s).astype(np.float32)) for s in ((WIDTH, rank), (rank, WIDTH)))
        return lambda: self.ms.ops.matmul(b, a).asnumpy()

    def dense(self) -> Any:
        return self.ms.nn.SequentialCell(self.ms.nn.Dense(WIDTH, WIDTH, has_bias=False)).set_train(False)


Side = Torch | MindSpore


def median(call: Callable[[], Any], times: int = 5) -> float:
    return statistics.median(timed(call, times))


def loaded(side: Side, folder: Path, targets: str, names: list[str]) -> Any:
    """The model with these adapters, the first of them active."""
    base = side.auto.from_pretrained(folder / "base")
    model = side.peft.PeftModel.from_pretrained(base, folder / targets / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / targets / name, name)
    return model


# --- what is measured -----------------------------------------------------------------------------------------------


def mixed(side: Side, folder: Path, targets: str) -> dict[str, float]:
    """One batch, a row for each adapter."""
    rows, _ = batch("llama")
    ids, single = side.array(rows), [side.array(rows[i : i + 1]) for i in range(ADAPTERS)]
    model = loaded(side, folder, targets, NAMES)
    side.forward(model, ids)
    found = {"plain": median(lambda: side.forward(model, ids))}
    side.forward(model, single[0])
    found["separate"] = median(lambda: [side.forward(model, row) for row in single])
    found["mixed_first"], logits = seconds_of(lambda: side.forward(model, ids, adapter_names=NAMES))
    np.save(folder / f"{type(side).__name__}-{side.repeats}-{targets}.npy", logits)
    before = side.compiled()
    found["mixed"] = median(lambda: side.forward(model, ids, adapter_names=NAMES))
    found["renamed"] = median(lambda: side.forward(model, ids, adapter_names=NAMES[::-1]))
    found["mixed_one"] = median(lambda: side.forward(model, ids, adapter_names=NAMES[:1] * ADAPTERS))
    found["renamed_compiled"] = side.compiled() - before
    return found


def switching(side: Side, folder: Path) -> dict[str, float]:
    """Another adapter for the whole batch."""
    ids = side.array(batch("llama")[0])
    model = loaded(side, folder, "qv", NAMES[:2])
    side.forward(model, ids)
    found, turn = {"forward": median(lambda: side.forward(model, ids))}, iter(NAMES[:2] * 100)

    def switch() -> None:
        model.set_adapter(next(turn))

    def switch_and_run() -> None:
        switch()
        side.forward(model, ids)

    found["switch_run"] = median(switch_and_run, side.repeats)
    found["switch"] = median(switch)
    return found


def swapping(side: Side, folder: Path) -> dict[str, float]:
    """Another adapter's numbers in the place of the active one."""
    ids = side.array(batch("llama")[0])
    model = loaded(side, folder, "qv", NAMES[:1])
    side.hotswap.prepare_model_for_compiled_hotswap(model, target_rank=2 * RANK)
    forward = side.logits_alone(model)
    forward(ids)
    paths = [folder / "qv" / name for name in NAMES[:2]]
    dicts = [side.weights(path) for path in paths]
    configs = [side.peft.PeftConfig.from_pretrained(path) for path in paths]
    turn = iter([1, 0] * 100)

    def from_dict() -> None:
        i = next(turn)
        side.hotswap.hotswap_adapter_from_state_dict(model, dict(dicts[i]), NAMES[0], configs[i])

    def from_file() -> None:
        side.hotswap.hotswap_adapter(model, paths[next(turn)], NAMES[0])

    def and_run(swap: Callable[[], None]) -> Callable[[], None]:
        def both() -> None:
            swap()
            forward(ids)

        return both

    before = side.compiled()
    found = {"swap": median(from_dict), "swap_run": median(and_run(from_dict))}
    found |= {"file": median(from_file), "file_run": median(and_run(from_file))}
    found["swap_compiled"] = side.compiled() - before
    return found


def crowd(side: Side, folder: Path) -> dict[str, float]:
    """A hundred adapters added and deleted, twice."""
    model = loaded(side, folder, "qv", NAMES[:1])
    config = side.peft.LoraConfig(r=RANK, target_modules=TARGETS["qv"])
    names = iter([f"n{i}" for i in range(CROWD)] * 4)
    found = {"rss_before": resident()}
    for again in ("", "_again"):
        added = timed(lambda: model.add_adapter(next(names), config), CROWD)
        found["rss_full" + again] = resident()
        deleted = timed(lambda: model.delete_adapter(next(names)), CROWD)
        found["rss_after" + again] = resident()
        if not again:
            for what, seconds in (("add", added), ("delete", deleted)):
                found[what + "_early"] = statistics.median(seconds[:10])
                found[what + "_late"] = statistics.median(seconds[-10:])
    return found


def resident() -> float:
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmRSS:")[1].split()[0]) / 1024


def merging(side: Side, folder: Path) -> dict[str, float]:
    """One layer, beside the bare product of its factors, and the whole model."""
    config = side.peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False)
    layer = side.peft.get_peft_model(side.dense(), config)
    product = side.product(RANK)
    product()
    found = {"product": median(product, 11)}
    for what, model in (("layer", layer), ("model", loaded(side, folder, "all", NAMES[:1]))):
        model.merge_adapter()
        model.unmerge_adapter()
        pairs = [(seconds_of(model.merge_adapter)[0], seconds_of(model.unmerge_adapter)[0]) for _ in range(7)]
        found["merge_" + what], found["unmerge_" + what] = (statistics.median(some) for some in zip(*pairs))
    return found


PARTS: dict[str, Callable[..., dict[str, float]]] = {
    "mixed qv": lambda side, folder: mixed(side, folder, "qv"),
    "mixed all": lambda side, folder: mixed(side, folder, "all"),
    "switching": switching,
    "swapping": swapping,
    "crowd": crowd,
    "merging": merging,
}

# Each table's rows: (what is written, figure, unit).
_MIXED = [
    ("one forward, one adapter for all rows", "plain", "ms"),
    (f"mixed batch, {ADAPTERS} adapters", "mixed", "ms"),
    ("the same, other names", "renamed", "ms"),
    ("mixed batch, all rows name one adapter", "mixed_one", "ms"),
    (f"{ADAPTERS} forwards of one row, no switching", "separate", "ms"),
    ("first mixed batch (compiles)", "mixed_first", "ms"),
    ("compilations for other names", "renamed_compiled", ""),
]
ROWS = {
    "mixed qv": _MIXED,
    "mixed all": _MIXED,
    "switching": [
        ("forward", "forward", "ms"),
        ("set_adapter", "switch", "ms"),
        ("set_adapter and next forward (graph mode compiles)", "switch_run", "ms"),
    ],
    "swapping": [
        ("hot swap from a state dict", "swap", "ms"),
        ("and next forward", "swap_run", "ms"),
        ("hot swap from a file", "file", "ms"),
        ("and next forward", "file_run", "ms"),
        ("compilations", "swap_compiled", ""),
    ],
    "crowd": [
        ("add_adapter, first 10", "add_early", "ms"),
        (f"add_adapter, last 10 of {CROWD}", "add_late", "ms"),
        ("delete_adapter, first 10", "delete_early", "ms"),
        ("delete_adapter, last 10", "delete_late", "ms"),
        ("memory before", "rss_before", "MB"),
        (f"memory with {CROWD}", "rss_full", "MB"),
        ("memory after deleting them", "rss_after", "MB"),
        (f"memory with {CROWD} again", "rss_full_again", "MB"),
        ("memory after deleting them again", "rss_after_again", "MB"),
    ],
    "merging": [
        (f"B·A of {WIDTH}x{RANK} and {RANK}x{WIDTH} alone", "product", "ms"),
        (f"merge_adapter, one layer of {WIDTH}x{WIDTH}", "merge_layer", "ms"),
        ("unmerge_adapter", "unmerge_layer", "ms"),
        ("merge_adapter, the model, all linear layers", "merge_model", "ms"),
        ("unmerge_adapter", "unmerge_model", "ms"),
    ],
}
TITLES = {
    "mixed qv": "Mixed batch: 8 rows of 128, LoRA on q_proj and v_proj",
    "mixed all": "Mixed batch: 8 rows of 128, LoRA on all linear layers",
    "switching": "Switching: 8 rows of 128, LoRA on q_proj and v_proj",
    "swapping": "Hot swapping between scalings, room for twice the rank",
    "crowd": f"{CROWD} adapters on q_proj and v_proj",
    "merging": "Merging",
}


# --- running it -----------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Random weights and random adapters, of different scalings, written once by HF's libraries for all contenders."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = dict(MODELS["llama"])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    base = transformers.AutoModelForCausalLM.from_config(config)
    base.save_pretrained(folder / "base")
    for targets, modules in TARGETS.items():
        configs = [
            LoraConfig(r=RANK, lora_alpha=RANK + i, target_modules=modules, init_lora_weights=False)
            for i in range(ADAPTERS)
        ]
        model = get_peft_model(base, configs[0], NAMES[0])
        for name, lora in zip(NAMES[1:], configs[1:]):
            model.add_adapter(name, lora)
        model.save_pretrained(folder / targets)
        base = model.unload()


def worker(contender: str, part: str, folder: Path) -> None:
    """Measure one part in this process and print its figures as JSON."""
    if contender == "prepare":
        prepare(folder)
        return
    side = Torch() if contender == "torch" else MindSpore(contender == "graph")
    print("FIGURES " + json.dumps(PARTS[part](side, folder)))


def spawn(contender: str, part: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.many_adapters", contender, part, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)})
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if done.returncode or (not lines and contender != "prepare"):
        raise RuntimeError(f"{contender}, {part} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[-1].removeprefix("FIGURES ")) if lines else {}


@contextlib.contextmanager
def prepared() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        spawn("prepare", "", Path(name))
        yield Path(name)


def main(rounds: int) -> None:
    """Run all contenders in turn and print a table for each part, each figure beside HF's."""
    with prepared() as folder:
        for part, rows in ROWS.items():
            runs: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
            for _ in range(rounds):
                for contender, found in runs.items():
                    found.append(spawn(contender, part, folder))
            report(part, rows, runs)
        for targets in TARGETS:
            first, *others = [np.load(path) for path in sorted(folder.glob(f"*-{targets}.npy"))]
            assert len(others) == len(CONTENDERS) - 1
            for other in others:
                assert np.abs(first - other).max() < 1e-3 * np.abs(first).max(), f"not the same computation: {targets}"


def report(part: str, rows: list[tuple[str, str, str]], runs: dict[str, list[dict[str, float]]]) -> None:
    middle = {
        contender: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for contender, found in runs.items()
    }
    print(f"\n{TITLES[part]}\n\n| | " + " | ".join(CONTENDERS.values()) + " |\n|---|" + "---|" * len(CONTENDERS))
    for label, key, unit in rows:
        cells = []
        for contender in CONTENDERS:
            value, base = middle[contender][key], middle["torch"][key]
            digits = 1 if unit == "ms" and value < 0.1 else 0
            shown = f"{value * (1000 if unit == 'ms' else 1):.{digits}f} {unit}".strip()
            compared = unit == "ms" and contender != "torch"
            cells.append(f"{shown} ({value / base:.2f}x)" if compared else shown)
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
