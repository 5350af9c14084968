"""A LoRA training step on CPU: ours in graph mode and PyNative beside HF peft and transformers on torch.

Every contender is a process of its own, so that peak memory is its own too, and they run in turn, round after round:
what the machine does meanwhile hits all of them. They start from the same weights, adapter and batch,
and their first losses are compared before anything is reported.

    python -m benchmarks lora_step [--rounds 3]
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH, LENGTH, STEPS, THREADS = 8, 128, 8, 2
LORA = {"r": 8, "lora_alpha": 16}
MODELS = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 8000,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "bert": {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "hidden_dropout_prob": 0.0,  # two libraries cannot drop the same values
        "attention_probs_dropout_prob": 0.0,
    },
}
TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}
CONTENDERS = {"torch": "HF peft on torch", "graph": "msft_peft, graph mode", "pynative": "msft_peft, PyNative"}


def batch(model: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, MODELS[model]["vocab_size"], (BATCH, LENGTH)).astype(np.int32)
    return ids, ids if model == "llama" else rng.integers(0, 2, BATCH).astype(np.int32)


def timed(call: Callable[[], Any], times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def seconds_of(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def run_torch(model: str, folder: Path) -> dict[str, Any]:
    """HF peft and transformers."""
    imported, _ = seconds_of(lambda: __import__("peft"))
    import torch
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.set_num_threads(THREADS)
    kinds = {"llama": "AutoModelForCausalLM", "bert": "AutoModelForSequenceClassification"}
    base = getattr(transformers, kinds[model]).from_pretrained(folder / "base")
    ids, labels = (torch.from_numpy(a).long() for a in batch(model))

    with torch.no_grad():
        base_forward = timed(lambda: base(ids), STEPS)
    config = LoraConfig(task_type=TASKS[model], target_modules=TARGETS[model], **LORA)
    wrap, net = seconds_of(lambda: get_peft_model(base, config))
    base = net.unload()
    net = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    with torch.no_grad():
        forward = timed(lambda: net(ids), STEPS)
    net.train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    losses = []

    def step() -> None:
        loss = net(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    first, _ = seconds_of(step)
    steps = timed(step, STEPS)
    save, _ = seconds_of(lambda: net.save_pretrained(folder / "saved-torch"))
    base = net.unload()
    load, _ = seconds_of(lambda: PeftModel.from_pretrained(base, folder / "saved-torch"))
    return locals() | {"loss": losses[0]}


def run_mindspore(model: str, folder: Path, graph: bool) -> dict[str, Any]:
    """This library."""
    os.environ["GLOG_v"] = "3"
    if not graph:
        os.environ["MS_DEV_LAUNCH_BLOCKING"] = "1"  # PyNative's asynchronous default is several times slower on CPU
    imported, _ = seconds_of(lambda: __import__("msft_peft"))
    import mindspore as ms
    from mindspore import Tensor, nn

    from msft_peft import LoraConfig, PeftModel, get_peft_model, models

    compiled = ms.jit if graph else lambda function: function
    kinds = {"llama": models.AutoModelForCausalLM, "bert": models.AutoModelForSequenceClassification}
    base = kinds[model].from_pretrained(folder / "base")
    ids, labels = (Tensor(a) for a in batch(model))

    def forward_of(net: nn.Cell) -> Callable[[], np.ndarray]:
        def forward(ids: Tensor) -> Tensor:
            return net(ids)["logits"]

        run = compiled(forward)
        run(ids).asnumpy()
        return lambda: run(ids).asnumpy()

    base_forward = timed(forward_of(base), STEPS)
    config = LoraConfig(task_type=TASKS[model], target_modules=TARGETS[model], **LORA)
    wrap, net = seconds_of(lambda: get_peft_model(base, config))
    base = net.unload()
    net = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).set_train(False)
    forward = timed(forward_of(net), STEPS)
    loss_only = models.LossOnly(net, ("input_ids", "labels")).set_train()
    optimizer = nn.AdamWeightDecay(loss_only.trainable_params(), 1e-4)
    # Waiting for the loss of a `ms.jit` step spins on one of the two cores; this cell's step does not.
    ms.set_context(mode=ms.GRAPH_MODE if graph else ms.PYNATIVE_MODE)
    train_step = nn.TrainOneStepCell(loss_only, optimizer).set_train()
    losses = []

    def step() -> None:
        losses.append(float(train_step(ids, labels)))

    first, _ = seconds_of(step)
    steps = timed(step, STEPS)
    save, _ = seconds_of(lambda: net.save_pretrained(folder / "saved-ours"))
    base = net.unload()
    load, _ = seconds_of(lambda: PeftModel.from_pretrained(base, folder / "saved-ours"))
    return locals() | {"loss": losses[0]}


def prepare(model: str, folder: Path) -> None:
    """Random weights and a random adapter, written once by HF's libraries for all contenders."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = dict(MODELS[model])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    kinds = {"llama": "AutoModelForCausalLM", "bert": "AutoModelForSequenceClassification"}
    base = getattr(transformers, kinds[model]).from_config(config)
    base.save_pretrained(folder / "base")
    lora = LoraConfig(task_type=TASKS[model], target_modules=TARGETS[model], **LORA)
    get_peft_model(base, lora).save_pretrained(folder / "adapter")


def worker(contender: str, model: str, folder: Path) -> None:
    """Run one contender in this process and print its figures as JSON."""
    if contender == "prepare":
        prepare(model, folder)
        return
    run = run_torch if contender == "torch" else run_mindspore
    found = run(model, folder) if contender == "torch" else run(model, folder, contender == "graph")
    names = ("imported", "wrap", "first", "save", "load", "loss")
    figures = {name: found[name] for name in names}
    for name in ("base_forward", "forward", "steps"):
        figures[name] = statistics.median(found[name])
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("FIGURES " + json.dumps(figures))


def spawn(contender: str, model: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.lora_step", contender, model, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)})
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if done.returncode or (not lines and contender != "prepare"):
        raise RuntimeError(f"{contender} on {model} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[-1].removeprefix("FIGURES ")) if lines else {}


def main(rounds: int) -> None:
    """Run all contenders in turn and print one table a model, each figure beside torch's."""
    for model in MODELS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            spawn("prepare", model, folder)
            runs: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
            for _ in range(rounds):
                for contender, found in runs.items():
                    found.append(spawn(contender, model, folder))
        report(model, runs)


def report(model: str, runs: dict[str, list[dict[str, float]]]) -> None:
    middle = {
        contender: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for contender, found in runs.items()
    }
    losses = {contender: figures["loss"] for contender, figures in middle.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-3, f"not the same computation: first losses {losses}"
    rows = {
        "training step": "steps",
        "first step (compiles)": "first",
        "forward, base": "base_forward",
        "forward, with LoRA": "forward",
        "get_peft_model": "wrap",
        "save": "save",
        "load": "load",
        "import": "imported",
        "peak memory": "peak_mb",
    }
    print(
        f"\n{model}: batch {BATCH} x {LENGTH}, LoRA r={LORA['r']} on {' and '.join(TARGETS[model])}, {THREADS} threads"
    )
    print("| | " + " | ".join(CONTENDERS.values()) + " |\n|---|" + "---|" * len(CONTENDERS))
    for label, key in rows.items():
        cells = []
        for contender in CONTENDERS:
            value, base = middle[contender][key], middle["torch"][key]
            shown = f"{value:.0f} MB" if key == "peak_mb" else f"{value * 1000:.0f} ms"
            cells.append(shown if contender == "torch" else f"{shown} ({value / base:.2f}x)")
        print(f"| {label} | " + " | ".join(cells) + " |")
    ratios = [figures["forward"] / figures["base_forward"] for figures in middle.values()]
    print("| forward, with LoRA / base | " + " | ".join(f"{ratio:.2f}x" for ratio in ratios) + " |", flush=True)


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
