"""A training step of prompt and prefix tuning on CPU, beside HF peft and transformers on torch.

As in `lora_step`, whose model and batch it takes: each contender is a process, all begin with the same weights
and virtual tokens, and their first losses are compared before anything is reported.

    python -m benchmarks prompts [--rounds 3]
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.lora_step import CONTENDERS, MODELS, STEPS, THREADS, batch, seconds_of, timed

MODEL, TOKENS = "llama", 20
METHODS = {"prompt tuning": "PromptTuningConfig", "prefix tuning": "PrefixTuningConfig"}
SETTINGS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS}


def run_torch(method: str, folder: Path) -> dict[str, Any]:
    """HF peft and transformers."""
    import peft
    import torch
    import transformers
    from peft import get_peft_model
    from safetensors.torch import load_file

    torch.set_num_threads(THREADS)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    net = get_peft_model(base, getattr(peft, METHODS[method])(**SETTINGS)).train()
    saved = load_file(folder / method / "adapter_model.safetensors")["prompt_embeddings"]
    trained = [p for p in net.parameters() if p.requires_grad]
    trained[0].data.copy_(saved)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids, labels = (torch.from_numpy(a).long() for a in batch(MODEL))
    losses = []

    def step() -> None:
        loss = net(input_ids=ids, labels=labels, use_cache=False if method == "prompt tuning" else None).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    first, _ = seconds_of(step)
    return {"first": first, "step": statistics.median(timed(step, STEPS)), "loss": losses[0]}


def run_mindspore(method: str, folder: Path, graph: bool) -> dict[str, Any]:
    """This library."""
    os.environ["GLOG_v"] = "3"
    if not graph:
        os.environ["MS_DEV_LAUNCH_BLOCKING"] = "1"
    import mindspore as ms
    from mindspore import Tensor, nn

    from msft_peft import PeftModel, models

    base = models.AutoModelForCausalLM.from_pretrained(folder / "base")
    net = PeftModel.from_pretrained(base, folder / method, is_trainable=True)
    loss_only = models.LossOnly(net, ("input_ids", "labels")).set_train()
    optimizer = nn.AdamWeightDecay(loss_only.trainable_params(), 1e-4)
    ms.set_context(mode=ms.GRAPH_MODE if graph else ms.PYNATIVE_MODE)
    train_step = nn.TrainOneStepCell(loss_only, optimizer).set_train()
    ids, labels = (Tensor(a) for a in batch(MODEL))
    losses = []

    def step() -> None:
        losses.append(float(train_step(ids, labels)))

    first, _ = seconds_of(step)
    return {"first": first, "step": statistics.median(timed(step, STEPS)), "loss": losses[0]}


def prepare(folder: Path) -> None:
    """Random weights and virtual tokens, written once by HF's libraries for all contenders."""
    import peft
    import torch
    import transformers
    from peft import get_peft_model

    torch.manual_seed(0)
    settings = dict(MODELS[MODEL])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    for method, kind in METHODS.items():
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        get_peft_model(base, getattr(peft, kind)(**SETTINGS)).save_pretrained(folder / method)


def spawn(contender: str, method: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.prompts", contender, method, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)})
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if done.returncode or (not lines and contender != "prepare"):
        raise RuntimeError(f"{contender}, {method}, failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[-1].removeprefix("FIGURES ")) if lines else {}


def main(rounds: int) -> None:
    """Run all contenders in turn and print one table, each figure beside torch's."""
    print(f"\n{MODEL}: {TOKENS} virtual tokens, {THREADS} threads")
    print("| | " + " | ".join(CONTENDERS.values()) + " |\n|---|" + "---|" * len(CONTENDERS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spawn("prepare", "", folder)
        for method in METHODS:
            runs = {contender: [spawn(contender, method, folder) for _ in range(rounds)] for contender in CONTENDERS}
            report(method, runs)


def report(method: str, runs: dict[str, list[dict[str, float]]]) -> None:
    middle = {
        contender: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for contender, found in runs.items()
    }
    losses = {contender: figures["loss"] for contender, figures in middle.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-3, f"not the same computation: first losses {losses}"
    for label, key in {"training step": "step", "first step (compiles)": "first", "peak memory": "peak_mb"}.items():
        cells = []
        for contender, figures in middle.items():
            value, base = figures[key], middle["torch"][key]
            shown = f"{value:.0f} MB" if key == "peak_mb" else f"{value * 1000:.0f} ms"
            cells.append(shown if contender == "torch" else f"{shown} ({value / base:.2f}x)")
        print(f"| {method}: {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    contender, method, place = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if contender == "prepare":
        prepare(place)
    else:
        is_torch = contender == "torch"
        figures = run_torch(method, place) if is_torch else run_mindspore(method, place, contender == "graph")
        figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print("FIGURES " + json.dumps(figures))
