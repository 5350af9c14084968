"""Generation on CPU, an adapter attached: ours in graph mode and PyNative beside HF peft and transformers on torch.

Every contender is a process of its own, and they run in turn, round after round. They start from the same weights,
adapter and prompts, and their tokens must be equal before anything is reported.

    python -m benchmarks generation [--rounds 3]
"""

import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lora_step import CONTENDERS, THREADS, seconds_of, timed

PROMPT, NEW, REPEATS = 32, 64, 3
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
MODELS = {
    "3.7 M": {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4} | HEADS,
    "105 M": {"vocab_size": 2000, "hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8} | HEADS,
}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA r=8 on q_proj and v_proj": ("LoraConfig", {"r": 8, "target_modules": ["q_proj", "v_proj"]}),
    "a prefix of 16 tokens": ("PrefixTuningConfig", {"num_virtual_tokens": 16}),
}
# What is asked of each model: rows of the batch, options.
TASKS: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {
    "3.7 M": {"greedy, batch 1": (1, {}), "greedy, batch 4": (4, {}), "4 beams, batch 1": (1, {"num_beams": 4})},
    "105 M": {"greedy, batch 1": (1, {})},
}


def prompts(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 2000, (rows, PROMPT)).astype(np.int32)


def run_torch(model: str, folder: Path) -> dict[str, Any]:
    """HF peft and transformers."""
    import torch
    import transformers
    from peft import PeftModel

    torch.set_num_threads(THREADS)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    net = PeftModel.from_pretrained(base, folder / "adapter").eval()

    def generate(rows: int, options: dict[str, Any]) -> np.ndarray:
        ids = torch.from_numpy(prompts(rows)).long()
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 2, **options}
        return net.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings).numpy()

    return measured(model, generate)


def run_mindspore(model: str, folder: Path, graph: bool) -> dict[str, Any]:
    """This library."""
    os.environ["GLOG_v"] = "3"
    if not graph:
        os.environ["MS_DEV_LAUNCH_BLOCKING"] = "1"  # PyNative's asynchronous default is several times slower on CPU
    import mindspore as ms

    from msft_peft import PeftModel, models

    ms.set_context(mode=ms.GRAPH_MODE if graph else ms.PYNATIVE_MODE)
    base = models.AutoModelForCausalLM.from_pretrained(folder / "base")
    net = PeftModel.from_pretrained(base, folder / "adapter").set_train(False)

    def generate(rows: int, options: dict[str, Any]) -> np.ndarray:
        settings = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 2, **options}
        return net.generate(prompts(rows), **settings).asnumpy()

    return measured(model, generate)


def measured(model: str, generate: Any) -> dict[str, Any]:
    """The first call of each task, which compiles, the median of the next ones, and the tokens."""
    found = {}
    for task, (rows, options) in TASKS[model].items():
        call = functools.partial(generate, rows, options)
        first, tokens = seconds_of(call)
        again = statistics.median(timed(call, REPEATS))
        found[task] = {"first": first, "again": again, "tokens": tokens.tolist()}
    return found


def prepare(model: str, adapter: str, folder: Path) -> None:
    """Random weights and a random adapter, written once by HF's libraries for all contenders."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODELS[model]))
    base.save_pretrained(folder / "base")
    kind, settings = ADAPTERS[adapter]
    net = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **settings))
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    net.save_pretrained(folder / "adapter")


def worker(contender: str, model: str, adapter: str, folder: Path) -> None:
    """Run one contender in this process and print its figures as JSON."""
    if contender == "prepare":
        prepare(model, adapter, folder)
    else:
        found = (
            run_torch(model, folder) if contender == "torch" else run_mindspore(model, folder, contender == "graph")
        )
        print("FIGURES " + json.dumps(found))


def spawn(contender: str, model: str, adapter: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.generation", contender, model, adapter, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)})
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if done.returncode or (not lines and contender != "prepare"):
        raise RuntimeError(f"{contender} with {model}, {adapter}, failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[-1].removeprefix("FIGURES ")) if lines else {}


def main(rounds: int) -> None:
    """Run all contenders in turn and print a table for each model and adapter, each figure beside torch's."""
    for model, adapter in itertools.product(MODELS, ADAPTERS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            spawn("prepare", model, adapter, folder)
            runs: dict[str, list[dict[str, Any]]] = {contender: [] for contender in CONTENDERS}
            for _ in range(rounds):
                for contender, found in runs.items():
                    found.append(spawn(contender, model, adapter, folder))
        report(model, adapter, runs)


def report(model: str, adapter: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    print(f"\nllama ({model} parameters), {adapter}: {PROMPT} + {NEW} tokens, {THREADS} threads")
    print("| | " + " | ".join(CONTENDERS.values()) + " |\n|---|" + "---|" * len(CONTENDERS))
    for task, (rows, _) in TASKS[model].items():
        tokens = [run[task]["tokens"] for found in runs.values() for run in found]
        assert all(one == tokens[0] for one in tokens), f"{task}: not the same tokens"
        for label, key in ((f"{task}: tokens/s", "again"), (f"{task}: first call", "first")):
            cells = []
            middle = {who: statistics.median(run[task][key] for run in found) for who, found in runs.items()}
            for who, seconds in middle.items():
                shown = f"{rows * NEW / seconds:.0f}" if key == "again" else f"{seconds:.1f} s"
                ratio = middle["torch"] / seconds if key == "again" else seconds / middle["torch"]
                cells.append(shown if who == "torch" else f"{shown} ({ratio:.2f}x)")
            print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    worker(*sys.argv[1:4], Path(sys.argv[4]))
