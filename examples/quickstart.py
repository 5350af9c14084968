"""LoRA end to end, offline, in about two minutes on two CPU cores.

A small byte-level Llama learns a little English (the manual that ships with Python). LoRA then teaches it Python
itself (the standard library's sources), beside full fine-tuning for comparison. The adapter is saved, loaded into a
fresh base model, and merged; each time the outputs are shown to agree.

    python examples/quickstart.py [--steps 80] [--out outputs/quickstart]
"""

import argparse
import os
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log lines: errors only
os.environ.setdefault("MS_DEV_LAUNCH_BLOCKING", "1")  # PyNative, which samples the text, is several times faster so

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from msft_peft import LoraConfig, PeftModel, get_peft_model
from msft_peft.models import LlamaConfig, LlamaForCausalLM, LossOnly

BATCH, LENGTH = 8, 128
COLUMNS = ("input_ids", "labels")
PRETRAIN_LR, LORA_LR, FULL_LR = 6e-3, 5e-3, 2e-3
CONFIG = LlamaConfig(
    vocab_size=256,  # one token a byte
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    initializer_range=0.08,  # small models start too flat with the usual 0.02
)


class Text:
    """A text as bytes: nine tenths to train on, drawn at random, and the rest held out."""

    def __init__(self, text: str, seed: int = 0) -> None:
        data = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
        cut = len(data) * 9 // 10
        self.train, self.held_out = data[:cut], data[cut:]
        self.rng = np.random.default_rng(seed)

    def batch(self) -> Tensor:
        """A random (BATCH, LENGTH) batch of the training part."""
        starts = self.rng.integers(0, len(self.train) - LENGTH, BATCH)
        return Tensor(np.stack([self.train[s : s + LENGTH] for s in starts]))

    def test(self, batches: int = 8) -> list[Tensor]:
        """The same batches of the held-out part each time, spread over it evenly."""
        starts = np.linspace(0, len(self.held_out) - LENGTH, batches * BATCH).astype(int)
        rows = np.stack([self.held_out[s : s + LENGTH] for s in starts])
        return [Tensor(part) for part in rows.reshape(batches, BATCH, LENGTH)]


def english() -> Text:
    return Text("\n".join(topics.values()))


def python_code() -> Text:
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-k]*.py"))
    return Text("\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in sources))


def train(model: nn.Cell, text: Text, steps: int, lr: float, label: str) -> list[float]:
    """Train what is trainable in `model`, in one compiled step; returns the losses."""
    loss_only = LossOnly(model, COLUMNS).set_train()
    warmed = np.minimum(np.arange(1, steps + 1) / 10, 1)
    schedule = lr * warmed * (0.55 + 0.45 * np.cos(np.pi * np.arange(steps) / steps))
    optimizer = nn.Adam(loss_only.trainable_params(), Tensor(schedule.astype(np.float32)))
    grad = ms.value_and_grad(loss_only, None, optimizer.parameters)

    @ms.jit
    def step(ids: Tensor) -> Tensor:
        loss, gradients = grad(ids, ids)
        optimizer(gradients)
        return loss

    losses = []
    with tqdm(range(steps), desc=f"{label:<24}", unit="step") as progress:
        for _ in progress:
            losses.append(float(step(text.batch())))
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    model.set_train(False)
    return losses


def bits_per_byte(model: nn.Cell, text: Text) -> float:
    """Held-out loss in bits: what a byte costs a compressor that uses this model."""
    loss = ms.jit(LossOnly(model, COLUMNS).set_train(False))
    return float(np.mean([float(loss(ids, ids)) for ids in text.test()])) / np.log(2)


def logits(model: nn.Cell, ids: Tensor) -> np.ndarray:
    return model(ids)["logits"].asnumpy()


def sample(model: nn.Cell, prompt: str, new_tokens: int = 100) -> str:
    ids = Tensor(np.frombuffer(prompt.encode(), dtype=np.uint8).astype(np.int32)[None])
    ms.set_seed(1)
    out = model.generate(ids, max_new_tokens=new_tokens, do_sample=True, temperature=0.7, top_k=20)
    return bytes(out.asnumpy()[0].astype(np.uint8)).decode(errors="replace")


def plot(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for label, losses in curves.items():
        smooth = np.convolve(losses, np.ones(5) / 5, mode="valid")
        axes.plot(np.arange(len(smooth)) + 5, smooth / np.log(2), label=label)
    axes.set(xlabel="step", ylabel="training loss, bits per byte", title="From English to Python")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(steps: int, out: Path, say: Callable[..., None] = print) -> dict[str, float]:
    """The whole tour; returns the figures that it printed."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    ms.set_seed(0)
    manual, code = english(), python_code()

    say("\n1. A base model: a small Llama that has read Python's manual")
    base = LlamaForCausalLM(CONFIG)
    train(base, manual, 2 * steps, PRETRAIN_LR, "pre-training on English")
    base.save_pretrained(out / "base")
    before = bits_per_byte(base, code)

    say("\n2. LoRA: the same model learns Python, its own weights frozen")
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    curves = {"LoRA": train(model, code, steps, LORA_LR, "LoRA on Python")}
    after = bits_per_byte(model, code)

    say("\n3. For comparison: full fine-tuning, as many steps")
    full = LlamaForCausalLM.from_pretrained(out / "base")
    curves["full fine-tuning"] = train(full, code, steps, FULL_LR, "all weights on Python")
    whole = bits_per_byte(full, code)
    figures = {"base": before, "lora": after, "full": whole}
    say("   held-out bits per byte of Python source (lower is better)")
    for label, bits in zip(("base model", "with LoRA", "full fine-tuning"), figures.values(), strict=True):
        say(f"     {label:<18}{bits:.3f}")

    say(f"\n4. Save: only what was trained goes into {out / 'adapter'}")
    model.save_pretrained(out / "adapter")
    for path in [*sorted((out / "adapter").iterdir()), out / "base" / "model.safetensors"]:
        say(f"     {path.name:<28}{path.stat().st_size / 1024:8.1f} KiB")

    say("\n5. Load into a fresh base model, then merge")
    ids = code.test(1)[0]
    trained = logits(model, ids)
    fresh = LlamaForCausalLM.from_pretrained(out / "base")
    loaded = PeftModel.from_pretrained(fresh, out / "adapter")
    figures["reload_error"] = float(np.abs(logits(loaded, ids) - trained).max())
    merged = loaded.merge_and_unload()
    figures["merge_error"] = float(np.abs(logits(merged, ids) - trained).max())
    say("     largest difference of logits: reloaded {reload_error:.1e}, merged {merge_error:.1e}".format(**figures))

    say("\n6. A sample")
    prompt = "def __init__(self, "
    say(sample(model, prompt))

    plot(curves, out / "loss.png")
    say(f"\nLoss curves: {out / 'loss.png'}. All of it took {time.perf_counter() - start:.0f} s.")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="LoRA steps; pre-training takes twice as many")
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="where files go")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.out)
