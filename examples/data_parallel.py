"""LoRA on several workers: each takes its share of every batch, and all end with the same adapter.

    msrun --worker_num=2 --local_worker_num=2 --join=True examples/data_parallel.py

Without msrun it runs alone, on the whole batches, and comes to the same adapter but for rounding. docs/distributed.md
goes through it.
"""

import argparse
import os
from pathlib import Path

# Blocking launches are some ten times faster in PyNative on CPU; MindSpore reads this when it is imported.
os.environ.setdefault("MS_DEV_LAUNCH_BLOCKING", "1")

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.communication import get_group_size, get_rank, init

from msft_peft import LoraConfig, get_peft_model
from msft_peft.models import LlamaConfig, LlamaForCausalLM
from msft_peft.parallel import require_equal_adapters


def make_model():
    """The same on every worker: the seed decides the base model and the adapter's first weights alike."""
    ms.set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/data_parallel"))
    parser.add_argument("--compiled", action="store_true", help="step in a ms.jit function")
    options = parser.parse_args()

    ms.set_device("CPU")
    rank, workers = 0, 1
    if "MS_ROLE" in os.environ:  # msrun says so
        init()
        rank, workers = get_rank(), get_group_size()
        ms.set_auto_parallel_context(parallel_mode="data_parallel", gradients_mean=True)

    model = make_model()
    require_equal_adapters(model)  # nobody sends weights around: that they agree must be seen to
    optimizer = nn.Adam(model.trainable_params(), learning_rate=1e-2)
    reduce = nn.DistributedGradReducer(optimizer.parameters) if workers > 1 else nn.Identity()

    def loss_of(ids):
        return model(input_ids=ids, labels=ids)["loss"]

    gradients = ms.value_and_grad(loss_of, None, optimizer.parameters)

    def step(ids):
        loss, grads = gradients(ids)
        optimizer(reduce(grads))
        return loss

    if options.compiled:
        step = ms.jit(step)
    rng = np.random.default_rng(0)
    for number in range(options.steps):
        batch = rng.integers(0, 64, (8, 16)).astype(np.int32)  # the same on every worker ...
        loss = step(Tensor(np.split(batch, workers)[rank]))  # ... which takes its own part
        print(f"worker {rank} of {workers}, step {number}: loss {float(loss.asnumpy()):.4f}")

    require_equal_adapters(model)
    model.save_pretrained(options.output, is_main_process=rank == 0)
    model.save_pretrained(options.output / f"of-worker-{rank}")  # for the curious: they are equal to the bit


if __name__ == "__main__":
    main()
