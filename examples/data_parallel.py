"""LoRA on several workers, each with its share of every batch, on one machine's CPU.

    msrun --worker_num=2 --local_worker_num=2 --master_addr=127.0.0.1 --master_port=8118 --join=True \
        examples/data_parallel.py [--steps 20] [--out outputs/data_parallel] [--pynative]

Without msrun it is one worker with the whole batch, and trains the same adapter up to rounding.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log lines: errors only
os.environ.setdefault("MS_DEV_LAUNCH_BLOCKING", "1")  # PyNative is several times faster so on CPU

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import get_group_size, get_rank, init

from msft_peft import LoraConfig, PeftModel, get_peft_model
from msft_peft.distributed import broadcast_adapter, check_equal_adapters
from msft_peft.models import LlamaConfig, LlamaForCausalLM, LossOnly

BATCH, LENGTH, LR = 8, 16, 0.01
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.1,
)


def join() -> tuple[int, int]:
    """This worker's rank, and the number of workers; (0, 1) without msrun."""
    ms.set_device("CPU")
    if "MS_WORKER_NUM" in os.environ:
        init()
    return get_rank(), get_group_size()


def build() -> PeftModel:
    """The same base model on every worker, and an adapter that is the same after the broadcast."""
    ms.set_seed(0)
    base = LlamaForCausalLM(CONFIG)  # or from_pretrained: the same file everywhere
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    broadcast_adapter(model)
    check_equal_adapters(model)
    return model


def batches(steps: int, rank: int, workers: int) -> list[Tensor]:
    """This worker's rows of each batch: every `workers`-th one, from its own rank on."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, CONFIG.vocab_size, (steps, BATCH, 1))
    rows = (starts + 3 * np.arange(LENGTH)) % CONFIG.vocab_size  # counting in threes: something to learn
    return [Tensor(batch[rank::workers].astype(np.int32)) for batch in rows]


def train(model: PeftModel, data: list[Tensor], workers: int, compiled: bool) -> list[float]:
    """Train on this worker's rows with the mean of all workers' gradients; returns the mean losses."""
    loss_only = LossOnly(model, ("input_ids", "labels")).set_train()
    optimizer = nn.Adam(loss_only.trainable_params(), LR)
    grad = ms.value_and_grad(loss_only, None, optimizer.parameters)
    reduce = nn.DistributedGradReducer(optimizer.parameters, True, workers) if workers > 1 else nn.Identity()
    total = ops.AllReduce() if workers > 1 else nn.Identity()

    def step(ids: Tensor) -> Tensor:
        loss, gradients = grad(ids, ids)
        optimizer(reduce(gradients))
        return total(loss) / workers

    run = ms.jit(step) if compiled else step
    return [float(run(ids).asnumpy()) for ids in data]


def main(rank: int, workers: int, steps: int, out: Path, compiled: bool) -> PeftModel:
    model = build()
    losses = train(model, batches(steps, rank, workers), workers, compiled)
    check_equal_adapters(model)
    model.save_pretrained(out, is_main_process=rank == 0)
    print(f"worker {rank} of {workers}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("outputs/data_parallel"), help="where the adapter goes")
    parser.add_argument("--pynative", action="store_true", help="no compiled step")
    arguments = parser.parse_args()
    main(*join(), arguments.steps, arguments.out, not arguments.pynative)
