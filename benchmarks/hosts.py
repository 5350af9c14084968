"""A LoRA training step of one small Llama on each library of models: ours beside what people use there now.

Every contender is a process of its own in an environment of its own, and they run in turn, round after round. They
start from the same weights, adapter and batch, and their first losses are compared before anything is reported. Two
that are close, ours and MindFormers' own LoRA, then take turns in one process, step by step, so that what else the
machine does hits both; half of those processes build the one first, half the other.

    make bench-hosts ARGS="--rounds 3"
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
BATCH, LENGTH, STEPS, TURNS, THREADS = 4, 128, 8, 40, 2
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 2000,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
# Contender -> (what it is, its environment, folders of packages before that).
CONTENDERS = {
    "torch": ("HF peft on torch", ".venv-parity", ()),
    "reference": ("ours, reference model, graph mode", ".venv-parity", ()),
    "mindformers": ("ours on MindFormers, graph mode", ".venv-2.7.2", (".venv-mindformers",)),
    "pet": ("MindFormers' own LoRA, graph mode", ".venv-2.7.2", (".venv-mindformers",)),
    "mindnlp": ("ours on mindnlp", ".venv-2.7.2", (".venv-mindnlp",)),
    "peft_on_mindnlp": ("HF peft 0.17.1 on mindnlp", ".venv-2.7.2", (".venv-mindnlp", ".venv-mindnlp-peft")),
}
DUELS = ("mindformers,pet", "pet,mindformers")


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    return 1 + 0.05 * values if "norm" in name else 0.05 * values


def batch() -> np.ndarray:
    """One token more than are computed: MindFormers takes the last one for a label only."""
    return np.random.default_rng(0).integers(3, SIZES["vocab_size"], (BATCH, LENGTH + 1)).astype(np.int32)


def measured(step: Callable[[], float]) -> dict[str, Any]:
    seconds, losses = [], []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    return {"loss": losses[0], "last": losses[-1], "first": seconds[0], "steps": seconds[1:]}


def in_turns(first: str, second: str) -> dict[str, Any]:
    """Seconds of each step of two contenders in one process; each begins every other turn."""
    steps = {name: RUNS[name]() for name in (first, second)}
    losses = {name: step() for name, step in steps.items()}
    assert abs(losses[first] - losses[second]) < 1e-4, f"they do not compute the same: {losses}"
    seconds: dict[str, list[float]] = {first: [], second: []}
    for turn in range(TURNS):
        for name in (first, second) if turn % 2 else (second, first):
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def on_torch(library: Any) -> Callable[[], float]:
    """HF peft, on torch or on what stands in its place."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    if library is None:
        torch.set_num_threads(THREADS)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, attn_implementation="eager"))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.tensor(drawn(_plain(name), tuple(p.shape))))
    weights = [p for p in model.parameters() if p.requires_grad]
    ids, optimizer = torch.tensor(batch().astype(np.int64)), torch.optim.AdamW(weights, lr=1e-3)
    if library is not None:
        import mindspore as ms

        compute = ms.value_and_grad(lambda ids: model(input_ids=ids, labels=ids).loss, None, weights)

    def step() -> float:
        if library is None:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        else:
            loss, gradients = compute(ids)
            for p, gradient in zip(weights, gradients):
                p.grad = gradient
        optimizer.step()
        for p in weights:
            p.grad = None
        return loss.item()

    return step


def ours(base: Any, forward: Callable[[Any], Callable[[Any], Any]], ids: Any, graph: bool) -> Callable[[], float]:
    from msft_peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA))
    return _trained(model, forward(model), ids, graph)


def _trained(model: Any, forward: Callable[[Any], Any], ids: Any, graph: bool) -> Callable[[], float]:
    """A MindSpore model, by MindSpore's own optimizer."""
    import mindspore as ms
    from mindspore import Tensor, nn

    for name, p in model.parameters_and_names():
        p.set_data(Tensor(drawn(_plain(name), tuple(p.shape))))
    model.set_train()
    optimizer = nn.AdamWeightDecay(model.trainable_params(), 1e-3)
    compute = ms.value_and_grad(forward, None, optimizer.parameters)

    def update(ids: Any) -> Any:
        loss, gradients = compute(ids)
        return ms.ops.depend(loss, optimizer(gradients)) if graph else (loss, optimizer(gradients))[0]

    update = ms.jit(update) if graph else update
    return lambda: float(update(ids).asnumpy())


def on_reference() -> Callable[[], float]:
    from mindspore import Tensor

    from msft_peft.models import LlamaConfig, LlamaForCausalLM

    def forward(model: Any) -> Callable[[Any], Any]:
        return lambda ids: model(ids, labels=ids)["loss"]

    return ours(LlamaForCausalLM(LlamaConfig(**SIZES)), forward, Tensor(batch()), graph=True)


def on_mindnlp() -> Callable[[], float]:
    import mindnlp  # noqa: F401  before transformers
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def forward(model: Any) -> Callable[[Any], Any]:
        return lambda ids: model(input_ids=ids, labels=ids).loss

    base = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
    return ours(base, forward, torch.tensor(batch().astype(np.int64)), graph=False)


def peft_on_mindnlp() -> Callable[[], float]:
    import mindnlp

    from msft_peft.hosts import mindtorch_fixes

    mindtorch_fixes.apply()  # without them it does not train
    return on_torch(mindnlp)


def mindformers_llama() -> Any:
    from mindformers.models.llama import LlamaConfig, LlamaForCausalLM

    dtypes = ("compute_dtype", "param_init_type", "layernorm_compute_type", "softmax_compute_type", "rotary_dtype")
    return LlamaForCausalLM(
        LlamaConfig(
            batch_size=BATCH,
            seq_length=LENGTH,
            num_layers=SIZES["num_hidden_layers"],
            hidden_size=SIZES["hidden_size"],
            num_heads=SIZES["num_attention_heads"],
            intermediate_size=SIZES["intermediate_size"],
            vocab_size=SIZES["vocab_size"],
            max_position_embedding=SIZES["max_position_embeddings"],
            rms_norm_eps=SIZES["rms_norm_eps"],
            pad_token_id=0,
            use_flash_attention=False,
            use_rope_slice=True,
            fused_rms_norm=False,
            embedding_init_type="float32",
            **dict.fromkeys(dtypes, "float32"),
        )
    )


def on_mindformers() -> Callable[[], float]:
    from mindspore import Tensor

    return ours(mindformers_llama(), lambda model: model, Tensor(batch()), graph=True)


def pet() -> Callable[[], float]:
    from mindformers.pet import get_pet_model
    from mindspore import Tensor

    settings = {"lora_rank": LORA["r"], "lora_alpha": LORA["lora_alpha"], "lora_dropout": 0.0}
    model = get_pet_model(mindformers_llama(), {"pet_type": "lora", "target_modules": ".*wq|.*wv", **settings})
    return _trained(model, model, Tensor(batch()), graph=True)


_HF_NAMES = {
    "network.network.": "",
    "base_model.model.": "",
    ".base_layer": "",
    ".default": "",
    "mindpet_delta_lora_a": "lora_A.weight",
    "mindpet_delta_lora_b": "lora_B.weight",
    "tok_embeddings.embedding_weight": "embed_tokens.weight",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "norm_out": "norm",
    **{f".attention.w{x}.": f".self_attn.{x}_proj." for x in "qkvo"},
}


def _plain(name: str) -> str:
    """HF's name of a parameter, without what adapters put into it."""
    for other, hf in _HF_NAMES.items():
        name = name.replace(other, hf)
    return name


RUNS = {
    "torch": lambda: on_torch(None),
    "reference": on_reference,
    "mindnlp": on_mindnlp,
    "peft_on_mindnlp": peft_on_mindnlp,
    "mindformers": on_mindformers,
    "pet": pet,
}


def run(name: str) -> dict[str, Any]:
    """One contender, or two that take turns, in a process of its own."""
    _, environment, folders = CONTENDERS[name.partition(",")[0]]
    paths = [str(ROOT / folder) for folder in (*folders, ".")]
    more = {"PYTHONPATH": os.pathsep.join(paths), "GLOG_v": "3", "OMP_NUM_THREADS": str(THREADS)}
    if name in ("mindnlp", "peft_on_mindnlp"):
        more["MS_DEV_LAUNCH_BLOCKING"] = "1"  # PyNative's asynchronous default is several times slower on CPU
    command = [str(ROOT / environment / "bin" / "python"), "-m", "benchmarks.hosts", name]
    with tempfile.TemporaryDirectory() as scratch:  # MindFormers writes a log and a config where it runs
        environ = {**os.environ, **more, "LOG_MF_PATH": scratch}
        done = subprocess.run(command, env=environ, cwd=scratch, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(rounds: int) -> None:
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, found in results.items():
            found.append(run(name))
    losses = {name: found[0]["loss"] for name, found in results.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-3, f"they do not compute the same: {losses}"
    print(f"LoRA step, Llama {SIZES['hidden_size']}x{SIZES['num_hidden_layers']}, {BATCH}x{LENGTH} tokens, seconds")
    fastest = min(min(r["steps"]) for r in results["torch"])
    print(f"{'':36} {'best':>8} {'median':>8} {'first':>8} {'x torch':>8}")
    for name, found in results.items():
        steps = [second for r in found for second in r["steps"]]
        first = statistics.median(r["first"] for r in found)
        line = f"{CONTENDERS[name][0]:36} {min(steps):8.3f} {statistics.median(steps):8.3f} {first:8.2f}"
        print(f"{line} {min(steps) / fastest:8.2f}")
    print("\nMindFormers, in turns: ours / its own LoRA, medians of each process")
    for duel in (duel for _ in range(rounds) for duel in DUELS):
        found = run(duel)
        mine, theirs = found["mindformers"], found["pet"]
        paired = statistics.median(a / b for a, b in zip(mine, theirs))
        both = f"{statistics.median(mine):.3f} / {statistics.median(theirs):.3f} s"
        print(f"{duel:20} {both}, each turn {paired:.2f}x", flush=True)


if __name__ == "__main__":
    print()
    asked = sys.argv[1].split(",")
    print(json.dumps(in_turns(*asked) if len(asked) == 2 else measured(RUNS[asked[0]]())))
