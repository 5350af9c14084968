"""Over the Hub from here to HF peft on torch, and back."""

import numpy as np
import peft
import pytest
import torch
import transformers
from mindspore import Tensor

import msft_peft
import msft_peft.models
from tests.hub.server import Hub
from tests.models import tiny
from tests.parity.cases import same


@pytest.fixture
def base(hub: Hub) -> str:
    """A tiny Llama on the Hub."""
    tiny.decoder("llama3").push_to_hub("ada/tiny")
    return "ada/tiny"


def both(repo: str) -> tuple[np.ndarray, np.ndarray]:
    """The logits of the adapter in a repository: ours, and HF's."""
    ids = tiny.tokens()
    ours = msft_peft.AutoPeftModelForCausalLM.from_pretrained(repo)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(repo)
    with torch.no_grad():
        return ours(Tensor(ids))["logits"].asnumpy(), theirs(torch.tensor(ids)).logits.numpy()


def test_from_here_to_hf(base: str, hub: Hub):
    model = msft_peft.models.AutoModelForCausalLM.from_pretrained(base)
    config = msft_peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=2)
    msft_peft.get_peft_model(model, config).push_to_hub("ada/ours", metrics={"loss": 1.5})
    same("model output", *both("ada/ours"))


def test_from_hf_to_here(base: str, hub: Hub):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=2)
    peft.get_peft_model(model, config).push_to_hub("ada/theirs")
    same("model output", *both("ada/theirs"))


def test_a_card_of_hf_is_brought_up_to_date(base: str, hub: Hub):
    """Either side may push onto what the other pushed."""
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2))
    theirs.push_to_hub("ada/both")
    text = hub.files("ada/both")["README.md"].decode().split("---\n", 2)[2]
    ours = msft_peft.get_peft_model(
        msft_peft.models.AutoModelForCausalLM.from_pretrained(base), msft_peft.LoraConfig(r=2)
    )
    ours.push_to_hub("ada/both")
    card = hub.files("ada/both")["README.md"].decode()
    assert card.split("---\n", 2)[2].strip() == text.strip()
    theirs.push_to_hub("ada/both")
    assert "- mindspore" in hub.files("ada/both")["README.md"].decode().split("---\n", 2)[1]


def test_resized_embeddings(base: str, hub: Hub):
    """More tokens: HF has to be told, here the tensors tell."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=2)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.push_to_hub("ada/more", save_embedding_layers=True)
    ids = tiny.tokens() + 9
    ours = msft_peft.AutoPeftModelForCausalLM.from_pretrained("ada/more")(Tensor(ids))["logits"].asnumpy()
    with torch.no_grad():
        same("model output", ours, theirs(torch.tensor(ids)).logits.numpy())
