"""On mindnlp: transformers' own models, as HF peft on torch has them."""

import mindnlp  # noqa: F401, I001  before transformers and torch: it puts itself in torch's place

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy
import torch
from mindspore import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from msft_peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from msft_peft.errors import NoMatchingPeftModuleError
from msft_peft.models import LlamaForCausalLM as OurLlama
from msft_peft.registry import METHODS
from tests.hosts.llama import ADAPTERS, GOLDEN, LINEAR, SIZES, batch, config_of, drawn, golden
from tests.tolerances import array, assert_same, differ

# What a method cannot do without.
SETTINGS: dict[str, dict[str, Any]] = {
    "IA3": {"feedforward_modules": ["down_proj"]},
    "ADALORA": {"total_step": 10},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "FOURIERFT": {"n_frequency": 20},
    "OFT": {"oft_block_size": 4},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "MISS": {"r": 4},
    "HRA": {"r": 4},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "SHIRA": {"r": 2},
    "LOW_RANK_ADAPTER": {"reduction_factor": 4},
    "ROAD": {"group_size": 8},
    "SUPERTUNING": {"sparsity": 0.9},
}

# Without those that train biases, of which a Llama has none, and rows of embeddings.
METHODS_OF_LAYERS = {name for name, method in METHODS.items() if "dense" in method.patches} - {
    "BITFIT",
    "TRAINABLE_TOKENS",
}

IDS = torch.tensor(batch().astype(np.int64))


def fill(model: Any) -> Any:
    for name, p in model.named_parameters():
        p.copy_(torch.tensor(drawn(name, tuple(p.shape))))
    return model.eval()


def llama(**fields: Any) -> LlamaForCausalLM:
    return fill(LlamaForCausalLM(LlamaConfig(**SIZES | fields, attn_implementation="eager")))


def logits(model: Any) -> np.ndarray:
    return array(model(input_ids=IDS).logits)


def step(model: Any, **inputs: Any) -> tuple[float, dict[str, np.ndarray]]:
    """The loss, and its gradients by parameter name."""
    weights = model.trainable_params()

    def loss(*values: Any) -> Any:
        return model(**dict(zip(inputs, values))).loss

    value, gradients = ms.value_and_grad(loss, None, weights)(*inputs.values())
    return value.item(), {p.name: array(gradient) for p, gradient in zip(weights, gradients)}


# --- HF's numbers and files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_hf_adapters_give_hfs_numbers(name: str, tmp_path: Path):
    """Logits, loss, gradients, generated tokens, and the file to the byte; and our reference model gives the same."""
    wanted = golden(name)
    model = PeftModel.from_pretrained(llama(), GOLDEN / name, is_trainable=True).eval()
    assert isinstance(model, PeftModelForCausalLM)
    assert_same(logits(model), wanted["logits"], "merge")
    loss, gradients = step(model, input_ids=IDS, labels=IDS)
    assert abs(loss - wanted["loss"]) < 1e-5
    checked = {key.removeprefix("gradient/"): value for key, value in wanted.items() if key.startswith("gradient/")}
    assert checked
    assert checked.keys() <= gradients.keys()
    for key, value in checked.items():
        assert_same(gradients[key], value, "gradient")
    tokens = model.generate(input_ids=IDS[:, :5], max_new_tokens=6, do_sample=False)
    np.testing.assert_array_equal(array(tokens), wanted["tokens"])
    with model.disable_adapter():
        assert_same(logits(model), wanted["base"], "merge")
    model.save_pretrained(tmp_path)
    mine, theirs = (folder / "adapter_model.safetensors" for folder in (tmp_path, GOLDEN / name))
    assert mine.read_bytes() == theirs.read_bytes()
    assert PeftModel.from_pretrained(llama(), tmp_path).peft_config["default"].peft_type == ADAPTERS[name]["peft_type"]
    if "target_modules" in config_of(name):
        assert model.peft_config["default"].target_modules == config_of(name)["target_modules"]


def test_our_reference_model_gives_the_same(tmp_path: Path):
    """One folder for the base model, one for the adapter, two models."""
    base = llama()
    base.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(OurLlama.from_pretrained(tmp_path), GOLDEN / "lora")
    ids = ms.Tensor(batch())
    assert_same(array(ours(ids)["logits"]), logits(PeftModel.from_pretrained(base, GOLDEN / "lora")), "merge")


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_merging(name: str):
    wanted = golden(name)
    base = llama()
    model = PeftModel.from_pretrained(base, GOLDEN / name)
    model.merge_adapter()
    assert_same(logits(model), wanted["logits"], "merge")
    model.unmerge_adapter()
    assert_same(logits(model), wanted["logits"], "merge")
    merged = model.merge_and_unload()
    assert merged is base
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert_same(logits(merged), wanted["logits"], "merge")
    assert dict(merged.named_parameters()).keys() == dict(llama().named_parameters()).keys()


def test_unload_gives_the_model_back():
    base = llama()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=False))
    assert differ(logits(base), golden("lora")["base"])  # it is changed in place
    assert model.unload() is base
    assert_same(logits(base), golden("lora")["base"], "merge")


def test_several_adapters(tmp_path: Path):
    model = PeftModel.from_pretrained(llama(), GOLDEN / "lora")
    model.add_adapter("fresh", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("fresh")
    assert_same(logits(model), golden("lora")["base"], "merge")
    mixed = array(model(input_ids=IDS, adapter_names=["default", "__base__"]).logits)
    assert_same(mixed[0], golden("lora")["logits"][0], "merge")
    assert_same(mixed[1], golden("lora")["base"][1], "merge")
    model.set_adapter("default")
    assert_same(logits(model), golden("lora")["logits"], "merge")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "fresh" / "adapter_model.safetensors").is_file()
    model.load_adapter(tmp_path / "fresh", "again")
    model.delete_adapter("default")
    assert {p.partition(".lora_A.")[2] for p, _ in model.parameters_and_names() if ".lora_A." in p} == {
        "fresh.weight",
        "again.weight",
    }


def test_checkpoints_of_mindspore(tmp_path: Path):
    model = PeftModel.from_pretrained(llama(), GOLDEN / "lora")
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert_same(logits(PeftModel.from_pretrained(llama(), tmp_path)), golden("lora")["logits"], "merge")


def test_a_failed_call_changes_nothing():
    base = llama()
    before = {name: id(p) for name, p in base.named_parameters()}
    with pytest.raises(NoMatchingPeftModuleError, match="q_prj"):
        get_peft_model(base, LoraConfig(target_modules=["q_prj"]))
    assert [name for name, p in base.named_parameters() if not p.requires_grad] == []
    assert list(before) == [name for name, _ in base.named_parameters()]
    assert_same(logits(base), golden("lora")["base"], "merge")


def test_injection_into_the_model_itself():
    base = llama()
    assert inject_adapter_in_model(LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False), base) is base
    assert differ(logits(base), golden("lora")["base"])


# --- training -------------------------------------------------------------------------------------------------------


def moved(model: Any, before: dict[str, np.ndarray]) -> set[str]:
    return {name for name, p in model.parameters_and_names() if not np.array_equal(array(p), before[name])}


@pytest.mark.parametrize("optimizer", ["mindspore", "torch"])
def test_training_by_hand(optimizer: str):
    """MindSpore's optimizers and mindtorch's; a head that is trained whole."""
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]))
    model.train()
    assert model.training
    assert model.get_base_model().model.layers[0].training
    before = {name: array(p) for name, p in model.parameters_and_names()}
    weights = model.trainable_params()
    if optimizer == "mindspore":
        apply = nn.Adam(weights, 1e-2)
    else:
        adam = torch.optim.AdamW(weights, lr=1e-2)

        def apply(gradients: Any) -> None:
            for p, gradient in zip(weights, gradients):
                p.grad = gradient
            adam.step()

    def loss(ids: Any) -> Any:
        return model(input_ids=ids, labels=ids).loss

    compute, losses = ms.value_and_grad(loss, None, weights), []
    for _ in range(4):
        value, gradients = compute(IDS)
        apply(gradients)
        losses.append(value.item())
    assert losses == sorted(losses, reverse=True)
    assert moved(model, before) == {p.name for p in weights}
    keys = get_peft_model_state_dict(model)
    assert "base_model.model.lm_head.weight" in keys
    assert_same(array(model.get_base_model().module.lm_head.weight), keys["base_model.model.lm_head.weight"], "exact")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=["lora", "ia3", "prompt"],
)
def test_the_trainer(config: Any, tmp_path: Path):
    """As HF's scripts have it: it needs to be told nothing about the model."""
    model = get_peft_model(llama(), config)
    rows = [{"input_ids": row, "labels": row} for row in batch().astype(np.int64)] * 4
    before = {name: array(p) for name, p in model.parameters_and_names()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=5e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert moved(model, before) == {p.name for p in model.trainable_params()}
    assert trainer.evaluate()["eval_loss"] < losses[0]
    model.save_pretrained(tmp_path / "saved")
    assert_same(logits(PeftModel.from_pretrained(llama(), tmp_path / "saved")), logits(model.eval()), "merge")


def test_the_fixes_that_training_needs():
    """Each of these is wrong, or fails, in mindtorch 0.5.1 on CPU as it comes."""
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))  # applies them
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    assert array(ms.grad(lambda x: ((x - y) * (x - y)).sum())(x)).tolist() == [-4.0, -6.0]
    assert array(ms.ops.add(x, y) + 1).tolist() == [5.0, 8.0]  # results of MindSpore's own ops go on
    batch_, one = torch.ones((1, 2, 2)), torch.eye(2).reshape(1, 2, 2)
    assert array(torch.baddbmm(batch_, one, one, beta=2, alpha=3)).tolist() == [[[5.0, 2.0], [2.0, 5.0]]]
    assert torch.linalg.vector_norm(torch.tensor([[3.0], [4.0]])).item() == 5.0
    assert torch.addcdiv(x, y, y, value=2.0).numpy().tolist() == [3.0, 4.0]


@pytest.mark.parametrize("name", sorted(METHODS_OF_LAYERS))
def test_every_method_of_layers(name: str):
    """Two layers of each; a fresh adapter gives numbers, and what it trains gets gradients."""
    fields = {**SETTINGS.get(name, {}), "target_modules": ["v_proj", "down_proj"]}
    config = PeftConfig.from_dict({"peft_type": name, "task_type": "CAUSAL_LM", **fields})
    model = get_peft_model(llama(), config)
    loss, gradients = step(model, input_ids=IDS, labels=IDS)
    assert np.isfinite(loss)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    assert any(np.abs(gradient).max() > 0 for gradient in gradients.values())
    with model.disable_adapter():
        assert_same(logits(model), golden("lora")["base"], "merge")


# --- other models ---------------------------------------------------------------------------------------------------


def test_gpt2():
    """Its layers store (in, out), and its head is tied to its embeddings."""
    base = fill(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=60, n_positions=32)))
    before = logits(base)
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, fan_in_fan_out=True, task_type="CAUSAL_LM"))
    assert model.peft_config["default"].target_modules == ["c_attn"]
    model.eval()
    after = logits(model)
    assert differ(after, before)
    head, table = base.lm_head.weight, base.transformer.wte.weight
    assert head is table
    model.merge_adapter()
    assert_same(logits(model), after, "merge")
    model.unmerge_adapter()
    _, gradients = step(model, input_ids=IDS, labels=IDS)
    assert all(np.abs(gradient).max() > 1e-6 for gradient in gradients.values())
    assert_same(logits(model.unload()), before, "merge")


def test_a_classifier_of_bert(tmp_path: Path):
    def bert() -> Any:
        return fill(
            BertForSequenceClassification(
                BertConfig(
                    num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=60
                )
            )
        )

    model = get_peft_model(bert(), LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False)).eval()
    labels = torch.tensor(np.array([0, 1]))
    loss, gradients = step(model, input_ids=IDS, labels=labels)
    assert np.isfinite(loss)
    assert {name for name in gradients if "classifier" in name} == {
        f"base_model.model.classifier.modules_to_save.default.{leaf}" for leaf in ("weight", "bias")
    }
    assert all(np.abs(gradient).max() > 1e-6 for gradient in gradients.values())
    for p in model.trainable_params():
        p.copy_(torch.tensor(drawn(p.name, tuple(p.shape))))
    model.save_pretrained(tmp_path)
    keys = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= keys.keys()
    assert_same(logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(model), "exact")


@pytest.mark.parametrize("kind", ["LORA", "PROMPT_TUNING", "PREFIX_TUNING"])
def test_t5(kind: str):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
    base = fill(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)))
    fields = {} if kind == "LORA" else {"num_virtual_tokens": 2}
    model = get_peft_model(base, PeftConfig.from_dict({"peft_type": kind, "task_type": "SEQ_2_SEQ_LM", **fields}))
    loss, gradients = step(model.eval(), input_ids=IDS, labels=IDS[:, :4])
    assert np.isfinite(loss)
    assert any(np.abs(gradient).max() > 1e-6 for gradient in gradients.values())


# --- the way in -----------------------------------------------------------------------------------------------------


def test_the_auto_class(tmp_path: Path):
    """From the adapter's folder alone, by mindnlp; the classes of the hub's address are as they were."""
    llama().save_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(llama(), GOLDEN / "lora")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", provider="mindnlp")
    assert isinstance(loaded.get_base_model().module, LlamaForCausalLM)
    assert_same(logits(loaded), golden("lora")["logits"], "merge")
