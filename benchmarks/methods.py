"""A training step and a forward pass of each method, as ratios to LoRA's in the same run, beside HF peft on torch.

Each contender is a process that goes through all methods on one small Llama; each method takes turns with LoRA, step
by step, so that what else the machine does hits both. The adapters are drawn once by HF's library, whose files all
contenders load, and their first losses are compared before anything is reported. Layers adapted: q_proj and v_proj, or
what a method wants by default.

    python -m benchmarks methods [--rounds 1]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
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
    "Adaption prompts": ("AdaptionPromptConfig", {"adapter_len": 10, "adapter_layers": 2}),
    "BEFT": ("BeftConfig", {"target_modules": ["v_proj"]}),
    "DEFT": ("DeftConfig", QV | {"r": 8}),
    "GLoRA": ("GloraConfig", QV | {"r": 8}),
    "Lily": ("LilyConfig", QV | {"r": 8, "stride_A": 2}),
    "OSF": ("OSFConfig", QV | {"effective_rank": 448}),
    "PEANuT": ("PeanutConfig", QV | {"r": 8}),
    "Super-Tuning": ("SupertuningConfig", QV | {"sparsity": 0.99}),
    "TinyLoRA": ("TinyLoraConfig", QV | {"r": 2, "u": 64}),
    "Uni-LoRA": ("UniLoraConfig", QV | {"r": 4}),
    "WaveFT": ("WaveFTConfig", QV | {"n_frequency": 1000}),
    # Not PVeRA and Poly, whose steps are random.
}
REFERENCE = "LoRA"


def batch() -> np.ndarray:
    return np.random.default_rng(0).integers(0, MODEL["vocab_size"], (BATCH, LENGTH)).astype(np.int32)


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


class OnTorch:
    """HF peft and transformers."""

    def __init__(self, base: Path, adapter: Path) -> None:
        import peft
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        self.torch, self.ids = torch, torch.from_numpy(batch()).long()
        base_model = transformers.LlamaForCausalLM.from_pretrained(base)
        self.net = peft.PeftModel.from_pretrained(base_model, adapter, is_trainable=True)
        self.optimizer = torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=1e-4)

    def step(self) -> float:
        loss = self.net(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def set_train(self, training: bool) -> None:
        self.net.train(training)

    def forward(self) -> np.ndarray:
        with self.torch.no_grad():
            return self.net(input_ids=self.ids).logits.numpy()


class OnMindSpore:
    """This library, in the mode that the process is in."""

    def __init__(self, base: Path, adapter: Path) -> None:
        from mindspore import Tensor, nn

        from msft_peft import PeftModel, models

        self.ids = Tensor(batch())
        self.net = PeftModel.from_pretrained(models.LlamaForCausalLM.from_pretrained(base), adapter, is_trainable=True)
        loss_only = models.LossOnly(self.net, ("input_ids", "labels")).set_train()
        optimizer = nn.AdamWeightDecay(loss_only.trainable_params(), 1e-4)
        self.train_step = nn.TrainOneStepCell(loss_only, optimizer).set_train()

    def step(self) -> float:
        return float(self.train_step(self.ids, self.ids))

    def set_train(self, training: bool) -> None:
        self.net.set_train(training)

    def forward(self) -> np.ndarray:
        return self.net(input_ids=self.ids)["logits"].asnumpy()


def side_by_side(own: Callable[[], Any], reference: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of two calls that take turns, after a first of each, which may compile."""
    own(), reference()
    pairs = [(timed(own, 1)[0], timed(reference, 1)[0]) for _ in range(STEPS)]
    return statistics.median(mine for mine, _ in pairs), statistics.median(other for _, other in pairs)


def worker(contender: str, folder: Path) -> None:
    """Run one contender in this process and print its figures as JSON, a line for each method."""
    warnings.simplefilter("ignore")
    os.environ["GLOG_v"] = "3"
    if contender == "prepare":
        prepare(folder)
        return
    if contender == "pynative":
        os.environ["MS_DEV_LAUNCH_BLOCKING"] = "1"
    if contender != "torch":
        import mindspore as ms

        ms.set_context(mode=ms.GRAPH_MODE if contender == "graph" else ms.PYNATIVE_MODE)
    kind = OnTorch if contender == "torch" else OnMindSpore
    lora = kind(folder / "base", folder / REFERENCE)
    for method in METHODS:
        own = kind(folder / "base", folder / method)
        losses: list[float] = []
        step, lora_step = side_by_side(lambda: losses.append(own.step()), lora.step)  # noqa: B023
        own.set_train(False), lora.set_train(False)
        forward, lora_forward = side_by_side(own.forward, lora.forward)
        lora.set_train(True)
        found = {"step": step, "lora_step": lora_step, "forward": forward, "lora_forward": lora_forward}
        print("FIGURES " + json.dumps({"method": method, "loss": losses[0]} | found), flush=True)


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
    losses = {method: {contender: found[0][method]["loss"] for contender, found in runs.items()} for method in METHODS}
    for method, each in losses.items():
        spread = max(each.values()) - min(each.values())
        assert spread < 2e-3, f"{method}: not the same computation: first losses {each}"
    for key, title in {"step": "training step", "forward": "forward"}.items():
        print(f"\n{title}, {BATCH} x {LENGTH}, as a multiple of LoRA's, {THREADS} threads")
        print("| | " + " | ".join(CONTENDERS.values()) + " |\n|---|" + "---|" * len(CONTENDERS))
        for method in METHODS:
            cells = []
            for found in runs.values():
                own = statistics.median(run[method][key] for run in found)
                ratio = statistics.median(run[method][key] / run[method][f"lora_{key}"] for run in found)
                cells.append(f"{1000 * own:.0f} ms" if method == REFERENCE else f"{ratio:.2f}x")
            print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]))
