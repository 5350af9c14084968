"""A training step and a forward pass of each method, as ratios to LoRA's in the same run, beside HF peft on torch.

Each contender is a process that goes through all methods on one small Llama, LoRA first and last. The adapters are
drawn once by HF's library, whose files all contenders load, and their first losses are compared before anything is
reported. Layers adapted: q_proj and v_proj, or what a method wants by default.

    python -m benchmarks methods [--rounds 1]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lora_step import CONTENDERS, THREADS, timed

BATCH, LENGTH, STEPS = 4, 128, 6
MODEL = {
    "vocab_size": 2000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
QV = {"target_modules": ["q_proj", "v_proj"]}
# Ranks and sizes are those of HF's own comparison, brought to layers of 512.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", QV | {"r": 8}),
    "LoRA, DoRA": ("LoraConfig", QV | {"r": 8, "use_dora": True}),
    "AdaLoRA": ("AdaLoraConfig", QV | {"init_r": 12, "target_r": 8, "total_step": 1000}),
    "BOFT": ("BOFTConfig", QV | {"boft_block_size": 4}),
    "C3A": ("C3AConfig", QV | {"block_size": 64}),
    "DeLoRA": ("DeloraConfig", QV | {"r": 8}),
    "FourierFT": ("FourierFTConfig", QV | {"n_frequency": 1000}),
    "GraLoRA": ("GraloraConfig", QV | {"r": 8}),
    "HiRA": ("HiraConfig", QV | {"r": 8}),
    "HRA": ("HRAConfig", QV | {"r": 8}),
    "(IA)³": (
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "LN tuning": ("LNTuningConfig", {}),
    "LoHa": ("LoHaConfig", QV | {"r": 8}),
    "LoKr": ("LoKrConfig", QV | {"r": 8, "decompose_factor": 4}),
    "MiSS": ("MissConfig", QV | {"r": 16}),
    "MiSS, bat": ("MissConfig", QV | {"r": 16, "init_weights": "bat"}),
    "OFT": ("OFTConfig", QV | {"oft_block_size": 32}),
    "RandLoRA": ("RandLoraConfig", QV | {"r": 32}),
    "RoAd": ("RoadConfig", QV),
    "SHiRA": ("ShiraConfig", QV | {"r": 8, "random_seed": 0}),
    "Trainable tokens": ("TrainableTokensConfig", {"token_indices": [0, 1]}),
    "VB-LoRA": ("VBLoRAConfig", QV | {"r": 4, "num_vectors": 64, "vector_length": 64}),
    "VeRA": ("VeraConfig", QV | {"r": 64}),
}
AGAIN = "LoRA, again"


def batch() -> np.ndarray:
    return np.random.default_rng(0).integers(0, MODEL["vocab_size"], (BATCH, LENGTH)).astype(np.int32)


def folder_of(folder: Path, method: str) -> Path:
    return folder / ("LoRA" if method == AGAIN else method)


def prepare(folder: Path) -> None:
    """Random weights and adapters, written by HF's libraries."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL)).save_pretrained(folder / "base")
    for method, (kind, settings) in METHODS.items():
        base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
        net = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **settings))
        for p in net.parameters():
            if p.requires_grad:
                p.data += 0.01 * torch.randn_like(p)
        net.save_pretrained(folder / method)


def figures_of(steps: list[float], forward: list[float], loss: float) -> dict[str, float]:
    """Medians, without the first call, which may compile."""
    return {"step": statistics.median(steps[1:]), "forward": statistics.median(forward[1:]), "loss": loss}


def torch_figures(base_folder: Path, adapter: Path) -> dict[str, float]:
    """HF peft and transformers."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    ids = torch.from_numpy(batch()).long()
    base = transformers.LlamaForCausalLM.from_pretrained(base_folder)
    net = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    losses = []

    def step() -> None:
        loss = net(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    steps = timed(step, STEPS + 1)
    net.eval()
    with torch.no_grad():
        return figures_of(steps, timed(lambda: net(input_ids=ids).logits.numpy(), STEPS + 1), losses[0])


def mindspore_figures(base_folder: Path, adapter: Path, graph: bool) -> dict[str, float]:
    """This library."""
    import mindspore as ms
    from mindspore import Tensor, nn

    from msft_peft import PeftModel, models

    ms.set_context(mode=ms.GRAPH_MODE if graph else ms.PYNATIVE_MODE)
    ids = Tensor(batch())
    base = models.LlamaForCausalLM.from_pretrained(base_folder)
    net = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    loss_only = models.LossOnly(net, ("input_ids", "labels")).set_train()
    optimizer = nn.AdamWeightDecay(loss_only.trainable_params(), 1e-4)
    train_step = nn.TrainOneStepCell(loss_only, optimizer).set_train()
    losses = []
    steps = timed(lambda: losses.append(float(train_step(ids, ids))), STEPS + 1)
    net.set_train(False)
    return figures_of(steps, timed(lambda: net(input_ids=ids)["logits"].asnumpy(), STEPS + 1), losses[0])


def worker(contender: str, folder: Path) -> None:
    """Run one contender in this process and print its figures as JSON, a line for each method."""
    warnings.simplefilter("ignore")
    if contender == "prepare":
        prepare(folder)
        return
    os.environ["GLOG_v"] = "3"
    if contender == "pynative":
        os.environ["MS_DEV_LAUNCH_BLOCKING"] = "1"
    for method in (*METHODS, AGAIN):
        paths = folder / "base", folder_of(folder, method)
        found = torch_figures(*paths) if contender == "torch" else mindspore_figures(*paths, contender == "graph")
        print("FIGURES " + json.dumps({"method": method} | found), flush=True)


def spawn(contender: str, folder: Path) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.methods", contender, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)})
    if done.returncode:
        raise RuntimeError(f"{contender} failed:\n{done.stdout}\n{done.stderr[-3000:]}")
    lines = [line.removeprefix("FIGURES ") for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    return {figures.pop("method"): figures for figures in map(json.loads, lines)}


def main(rounds: int) -> None:
    """Run all contenders in turn and print one table: each method's time as a multiple of LoRA's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spawn("prepare", folder)
        runs: dict[str, list[dict[str, dict[str, float]]]] = {contender: [] for contender in CONTENDERS}
        for _ in range(rounds):
            for contender, found in runs.items():
                found.append(spawn(contender, folder))
    middle = {
        contender: {
            method: {key: statistics.median(run[method][key] for run in found) for key in ("step", "forward", "loss")}
            for method in (*METHODS, AGAIN)
        }
        for contender, found in runs.items()
    }
    for method in METHODS:
        losses = {contender: figures[method]["loss"] for contender, figures in middle.items()}
        spread = max(losses.values()) - min(losses.values())
        assert spread < 2e-3, f"{method}: not the same computation: first losses {losses}"
    for key, title in {"step": "training step", "forward": "forward"}.items():
        print(f"\n{title}, {BATCH} x {LENGTH}, as a multiple of LoRA's, {THREADS} threads")
        print("| | " + " | ".join(CONTENDERS.values()) + " |\n|---|" + "---|" * len(CONTENDERS))
        lora = {contender: figures["LoRA"][key] for contender, figures in middle.items()}
        print("| LoRA | " + " | ".join(f"{1000 * seconds:.0f} ms" for seconds in lora.values()) + " |")
        for method in [*METHODS, AGAIN][1:]:
            cells = [f"{figures[method][key] / lora[contender]:.2f}x" for contender, figures in middle.items()]
            print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]))
