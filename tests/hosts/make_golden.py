"""Writes tests/hosts/golden with HF peft on torch: `python -m tests.hosts.make_golden`, by hand, from the root."""

import json
import shutil

import numpy as np
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from .llama import ADAPTERS, GOLDEN, SIZES, batch, drawn


def base() -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")).eval()
    fill(model)
    return model


def fill(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.from_numpy(drawn(name, tuple(p.shape))))


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    ids = torch.from_numpy(batch()).long()
    plain = base()(ids).logits.detach().numpy()
    for name, fields in ADAPTERS.items():
        folder = GOLDEN / name
        model = get_peft_model(base(), PeftConfig.from_peft_type(**fields, task_type="CAUSAL_LM")).eval()
        fill(model)
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        saved = json.loads((folder / "adapter_config.json").read_text())
        saved |= {key: sorted(value) for key, value in saved.items() if isinstance(value, list)}
        (folder / "adapter_config.json").write_text(json.dumps(saved, indent=2, sort_keys=True))
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        arrays = {"base": plain, "logits": out.logits.detach().numpy(), "loss": out.loss.detach().numpy()}
        for key, p in model.named_parameters():
            if p.grad is not None and ("layers.1." in key or "layers" not in key):
                arrays[f"gradient/{key}"] = p.grad.numpy()
        arrays["tokens"] = model.generate(input_ids=ids[:, :5], max_new_tokens=6, do_sample=False).numpy()
        np.savez_compressed(folder / "io.npz", **arrays)


if __name__ == "__main__":
    main()
