"""A checkpoint of MindFormers, converted, gives the same logits in HF peft on torch and here."""

import warnings
from pathlib import Path

import mindspore as ms
import numpy as np
import peft
import torch
import transformers

from msft_peft import PeftModel, mindpet_to_peft
from msft_peft.models import LlamaForCausalLM
from tests.tolerances import array, assert_same, differ

SETTINGS = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LAYERS = {"attention.wq": (16, 16), "attention.wv": (8, 16), "feed_forward.w1": (24, 16), "feed_forward.w2": (16, 24)}


def test_a_converted_checkpoint_of_mindformers(tmp_path: Path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SETTINGS, num_attention_heads=4, num_key_value_heads=2)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "base")
    rng, tensors = np.random.default_rng(1), {}
    for n in range(2):
        for layer, (out, size) in LAYERS.items():
            stem = f"model.layers.{n}.{layer}.mindpet_delta_lora_"
            tensors[f"{stem}a"] = rng.standard_normal((4, size)).astype(np.float32)
            tensors[f"{stem}b"] = 0.3 * rng.standard_normal((out, 4)).astype(np.float32)
    block = {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "target_modules": "wq|wv|w1|w2"}
    mindpet_to_peft(tensors, tmp_path / "adapter", config=block, architecture="llama")

    ids = np.random.default_rng(2).integers(0, 60, (2, 7))
    base = theirs(torch.tensor(ids)).logits.detach().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    wanted = adapted(input_ids=torch.tensor(ids)).logits.detach().numpy()
    ours = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    result = ours(ms.Tensor(ids, ms.int32))
    logits = result["logits"] if isinstance(result, dict) else result[0] if isinstance(result, tuple) else result
    assert_same(array(logits), wanted, "merge")
    assert differ(wanted, base)
