"""What one worker does in tests/distributed/test_data_parallel.py; started by msrun, or alone.

python worker.py OUT: leaves OUT/alone or OUT/rank_N .npz files, and what rank 0 saved.
"""

import sys
from pathlib import Path

import data_parallel
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from msft_peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from msft_peft.backend.arrays import write
from msft_peft.distributed import broadcast_adapter, check_equal_adapters
from msft_peft.errors import ConfigError, PeftError
from tests import nets

STEPS = 6


def adapter_of(model: PeftModel) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy().copy() for p in model.trainable_params()}


def expect(error: type[Exception], text: str, call) -> None:
    with pytest.raises(error, match=text):
        call()


def workers_that_differ(rank: int) -> dict[str, np.ndarray]:
    """Adapters from different seeds are noticed, and equal after the broadcast, in any dtype; returns worker 1's."""
    settings = {"r": 2, "target_modules": ["backbone"], "init_lora_weights": False}
    model = None
    for dtype in (ms.float32, ms.float16, ms.bfloat16):
        ms.set_seed(0)
        base = nets.Classifier(dtype)
        ms.set_seed(rank)
        model = get_peft_model(
            base, LoraConfig(**settings, modules_to_save=["classifier"]), autocast_adapter_dtype=False
        )
        for p in model.trainable_params():
            write(p, Tensor(np.random.default_rng(rank).standard_normal(p.shape).astype(np.float32), p.dtype))
        mine = adapter_of(model)
        expect(PeftError, "worker 1 are not those of worker 0", lambda m=model: check_equal_adapters(m))
        broadcast_adapter(model, root=1)
        check_equal_adapters(model)
        kept = all((new == mine[name]).all() for name, new in adapter_of(model).items())
        assert kept == (rank == 1)
    expect(ConfigError, "none of the 2 workers", lambda: broadcast_adapter(model, root=2))
    other = get_peft_model(nets.Classifier(), LoraConfig(r=2 + rank, target_modules=["backbone"]))
    expect(PeftError, "Nothing was sent", lambda: broadcast_adapter(other))
    return {name: value.astype(np.float32) for name, value in adapter_of(model).items()}


def eva(rank: int, workers: int) -> dict[str, np.ndarray]:
    """EVA over all workers' batches: of each batch of 40 rows each worker has its part, of a size of its own."""
    ms.set_seed(0)
    config = LoraConfig(r=2, target_modules=["lin0", "lin1"], init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    model = get_peft_model(nets.Dense(), config)
    spread = np.array([5, 4, 3, 2, 1, 0.5])
    whole = [(np.random.default_rng(i).standard_normal((40, 6)) * spread).astype(np.float32) for i in range(3)]
    parts = whole if workers == 1 else [np.split(batch, [28])[rank] for batch in whole]
    initialize_lora_eva_weights(
        model,
        [Tensor(part) for part in parts],
        forward_fn=lambda net, x: net(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    if workers > 1:
        check_equal_adapters(model)
    return {name: value for name, value in adapter_of(model).items() if "lora_A" in name}


def main(out: Path) -> None:
    rank, workers = data_parallel.join()
    name = "alone" if workers == 1 else f"rank_{rank}"
    for compiled in (True, False):
        model = data_parallel.main(rank, workers, STEPS, out / f"saved_by_{workers}_{compiled}", compiled)
        np.savez(out / f"{name}_{compiled}.npz", **adapter_of(model))
    np.savez(out / f"{name}_eva.npz", **eva(rank, workers))
    if workers > 1:
        np.savez(out / f"{name}_other.npz", **workers_that_differ(rank))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
