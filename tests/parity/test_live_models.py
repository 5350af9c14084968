"""Whole transformers models against ours, live: the same checkpoint and the same adapter on either side."""

import functools
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import torch
import transformers
from mindspore import nn
from peft import AutoPeftModel, AutoPeftModelForCausalLM
from peft import LoraConfig as HfLoraConfig
from peft import PeftModel as HfPeftModel
from peft import get_peft_model as hf_get_peft_model
from peft.tuners.lora import LoraLayer

from msft_peft import LoraConfig, PeftModel, get_peft_model, models
from msft_peft.core.layer import TunerLayer

from . import ours, theirs
from .cases import file_key, make_weight, same, same_dicts

DECODER = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
    "tie_word_embeddings": False,
}
ENCODER = {key: DECODER[key] for key in list(DECODER)[:5]} | {
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attn_implementation": "eager",
}
SEQ2SEQ = {
    "vocab_size": 30,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


ROBERTA = ENCODER | {"pad_token_id": 0}


@dataclass(frozen=True)
class Model:
    """A model class of transformers, which ours is named like, its config, and a LoraConfig."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    # Saving HF's adapter warns of this, and loading it in HF does not.
    save_warning: str = ""

    @property
    def task(self) -> str | None:
        return self.lora.get("task_type")


GPT2 = {
    "vocab_size": 30,
    "n_embd": 16,
    "n_inner": 20,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
OPT = {key: value for key, value in DECODER.items() if key not in ("intermediate_size", "num_key_value_heads")}
OPT |= {"ffn_dim": 20, "word_embed_proj_dim": 16, "tie_word_embeddings": True}
OPT_350M = OPT | {"word_embed_proj_dim": 12, "do_layer_norm_before": False}
BLOOM = {key: GPT2[key] for key in ("vocab_size", "n_layer", "n_head", "attn_implementation")}
BLOOM |= {key: GPT2[key] for key in GPT2 if key.endswith("_id")} | {"hidden_size": 16}


def causal(kind: str, settings: dict | None = None, **lora: Any) -> Model:
    return Model(kind + "ForCausalLM", DECODER | (settings or {}), {"r": 3, "task_type": "CAUSAL_LM"} | lora)


def bert(head: str, **lora: Any) -> Model:
    return other("BertFor" + head, ENCODER, **lora)


def other(kind: str, settings: dict, **lora: Any) -> Model:
    return Model(kind, settings | {"num_labels": 2 if kind.endswith("Answering") else 3}, {"r": 3} | lora)


def seq2seq(kind: str, settings: dict | None = None, **lora: Any) -> Model:
    return Model(kind + "ForConditionalGeneration", SEQ2SEQ | (settings or {}), {"task_type": "SEQ_2_SEQ_LM"} | lora)


EMBEDDINGS = "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`."
MODELS = {
    "llama": causal("Llama"),
    "llama_all_linear": causal("Llama", target_modules="all-linear", r=2, lora_alpha=2, use_rslora=True),
    "llama_bias": causal("Llama", {"attention_bias": True}, target_modules=["k_proj", "down_proj"], bias="lora_only"),
    "llama_heads": causal("Llama", modules_to_save=["embed_tokens", "lm_head"]),
    "llama_embeddings": Model(
        "LlamaForCausalLM",
        DECODER,
        {"r": 3, "task_type": "CAUSAL_LM", "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        EMBEDDINGS,
    ),
    "llama_tied": causal("Llama", {"tie_word_embeddings": True}, target_modules=["o_proj"]),
    "llama_layer": causal("Llama", target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers"),
    "llama_tokens": causal(
        "Llama", {"tie_word_embeddings": True}, target_modules=["q_proj"], trainable_token_indices=[5, 24, 11]
    ),
    "llama_tied_copies": causal(
        "Llama",
        {"tie_word_embeddings": True},
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    ),
    "llama_dora": causal("Llama", target_modules=["q_proj", "down_proj"], use_dora=True),
    "llama_replicated": causal("Llama", target_modules=["v_proj", "up_proj"], layer_replication=[(0, 2), (0, 1)]),
    # The first text of the batch invokes it at its third token, the second one does not.
    "llama_alora": causal("Llama", target_modules=["q_proj", "o_proj"], alora_invocation_tokens=[5, 11]),
    "mistral": causal("Mistral", {"sliding_window": 3}),
    "qwen2": causal("Qwen2", bias="all"),
    "qwen3": causal("Qwen3", {"head_dim": 6}),
    "llama_seq_cls": Model("LlamaForSequenceClassification", DECODER | {"num_labels": 3}, {"task_type": "SEQ_CLS"}),
    "bert_seq_cls": bert("SequenceClassification", task_type="SEQ_CLS"),
    "bert_seq_cls_all_linear": bert("SequenceClassification", task_type="SEQ_CLS", target_modules="all-linear", r=2),
    "bert_token_cls": bert("TokenClassification", task_type="TOKEN_CLS", bias="lora_only"),
    "bert_qa": bert("QuestionAnswering", task_type="QUESTION_ANS"),
    "llama_token_cls": other("LlamaForTokenClassification", DECODER, task_type="TOKEN_CLS"),
    "llama_qa": other("LlamaForQuestionAnswering", DECODER, task_type="QUESTION_ANS"),
    "gpt2": Model("GPT2LMHeadModel", GPT2, {"r": 3, "task_type": "CAUSAL_LM"}),
    "gpt2_seq_cls": other("GPT2ForSequenceClassification", GPT2, task_type="SEQ_CLS", target_modules="all-linear"),
    "gpt2_token_cls": other("GPT2ForTokenClassification", GPT2, task_type="TOKEN_CLS", bias="lora_only"),
    "gpt2_qa": other("GPT2ForQuestionAnswering", GPT2, task_type="QUESTION_ANS"),
    "opt": Model("OPTForCausalLM", OPT, {"r": 3, "task_type": "CAUSAL_LM"}),
    "opt_350m": Model(
        "OPTForCausalLM", OPT_350M, {"r": 3, "task_type": "CAUSAL_LM", "target_modules": "all-linear", "bias": "all"}
    ),
    "opt_seq_cls": other("OPTForSequenceClassification", OPT_350M, task_type="SEQ_CLS"),
    "opt_qa": other("OPTForQuestionAnswering", OPT, task_type="QUESTION_ANS"),
    "bloom": Model("BloomForCausalLM", BLOOM, {"r": 3, "task_type": "CAUSAL_LM"}),
    "bloom_seq_cls": other("BloomForSequenceClassification", BLOOM, task_type="SEQ_CLS", target_modules="all-linear"),
    "bloom_token_cls": other("BloomForTokenClassification", BLOOM, task_type="TOKEN_CLS"),
    "bloom_qa": other("BloomForQuestionAnswering", BLOOM, task_type="QUESTION_ANS"),
    "roberta_seq_cls": other(
        "RobertaForSequenceClassification", ROBERTA, task_type="SEQ_CLS", target_modules="all-linear"
    ),
    "roberta_token_cls": other("RobertaForTokenClassification", ROBERTA, task_type="TOKEN_CLS"),
    "roberta_qa": other("RobertaForQuestionAnswering", ROBERTA, task_type="QUESTION_ANS"),
    "roberta_masked": other("RobertaForMaskedLM", ROBERTA),
    "bert_plain": bert("SequenceClassification", target_modules=["query", "key"], modules_to_save=["classifier"]),
    "t5": seq2seq("T5"),
    "mt5": seq2seq("MT5", {"num_layers": 1}, target_modules="all-linear", r=2),
}
COMPILED = [
    "llama_tokens",
    "llama_dora",
    "llama_replicated",
    "llama_alora",
    "llama_all_linear",
    "llama_embeddings",
    "llama_heads",
    "mistral",
    "qwen2",
    "qwen3",
    "llama_seq_cls",
]
COMPILED += ["bert_seq_cls", "bert_token_cls", "bert_qa", "t5"]
COMPILED += ["gpt2", "gpt2_token_cls", "opt_350m", "bloom_qa", "roberta_seq_cls"]
each_model = pytest.mark.parametrize("name", list(MODELS))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder of a model's checkpoint, written by transformers; made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def folder(name: str) -> Path:
        model = MODELS[name]
        kind = getattr(transformers, model.kind)
        torch.manual_seed(0)
        module = kind(kind.config_class(**model.settings))
        rng = np.random.default_rng(0)
        with torch.no_grad():
            for key, p in module.named_parameters():
                p.copy_(torch.tensor(make_weight(key.replace("LayerNorm", "norm"), tuple(p.shape), rng)))
        module.save_pretrained(root / name)
        return root / name

    return folder


def hf_base(name: str, folder: Path):
    settings = {"attn_implementation": "eager"}
    return getattr(transformers, MODELS[name].kind).from_pretrained(folder, **settings).eval()


def our_base(name: str, folder: Path) -> nn.Cell:
    return getattr(models, MODELS[name].kind).from_pretrained(folder)


def hf_adapter(name: str, folder: Path) -> HfPeftModel:
    """HF's model with a random adapter."""
    model = hf_get_peft_model(hf_base(name, folder), HfLoraConfig(**MODELS[name].lora))
    rng = np.random.default_rng(1)
    for key, p in model.named_parameters():
        if p.requires_grad:
            p.data = torch.tensor(make_weight(key, tuple(p.shape), rng))
    return model.eval()


def save_hf(model: HfPeftModel, name: str, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=MODELS[name].save_warning or "nothing")
        model.save_pretrained(folder)


def batch(name: str) -> dict[str, np.ndarray]:
    """Two sequences, the second padded at its end, and labels for the task."""
    rng = np.random.default_rng(2)
    ids = rng.integers(3, 30, (2, 6)).astype(np.int32)
    mask = np.ones((2, 6), np.int32)
    ids[1, 4:], mask[1, 4:] = 0, 0
    found = {"input_ids": ids, "attention_mask": mask}
    kind = MODELS[name].kind
    if kind.endswith("QuestionAnswering"):
        return found | {"start_positions": np.array([1, 2], np.int32), "end_positions": np.array([3, 3], np.int32)}
    if kind.endswith("SequenceClassification"):
        return found | {"labels": np.array([2, 0], np.int32)}
    labels = ids if kind.endswith(("LM", "LMHeadModel")) else rng.integers(0, 3, ids.shape).astype(np.int32)
    return found | {"labels": np.where(mask == 1, labels, -100).astype(np.int32)}


def logits_of(outputs: Any, kind: str) -> Any:
    if kind.endswith("QuestionAnswering"):
        return outputs["start_logits"] + 2 * outputs["end_logits"]
    return outputs["logits"]


class Loss(nn.Cell):
    """(loss, logits) of a model for positional arguments, in the order of a batch."""

    def __init__(self, model: nn.Cell, kind: str):
        super().__init__(auto_prefix=False)
        self.model, self.is_qa = model, kind.endswith("QuestionAnswering")

    def construct(self, input_ids, attention_mask, labels, ends=None):
        if self.is_qa:
            found = self.model(
                input_ids=input_ids, attention_mask=attention_mask, start_positions=labels, end_positions=ends
            )
            return found["loss"], found["start_logits"] + 2 * found["end_logits"]
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return found["loss"], found["logits"]


def our_numbers(model: PeftModel, name: str):
    params = model.trainable_params()
    arguments = [ms.Tensor(value) for value in batch(name).values()]
    step = ms.value_and_grad(Loss(model, MODELS[name].kind), None, params, has_aux=True)
    (loss, logits), grads = step(*arguments)
    return (
        loss.asnumpy(),
        logits.asnumpy(),
        {ours.torch_key(file_key(p.name)): g.asnumpy() for p, g in zip(params, grads)},
    )


def hf_numbers(model: HfPeftModel, name: str):
    model.zero_grad()
    found = model(**{key: torch.tensor(value).long() for key, value in batch(name).items()})
    found["loss"].backward()
    grads = {file_key(key): p.grad.numpy() for key, p in model.named_parameters() if p.requires_grad}
    return found["loss"].detach().numpy(), logits_of(found, MODELS[name].kind).detach().numpy(), grads


@each_model
def test_hf_s_adapter_on_our_model(name, checkpoints, tmp_path):
    """Logits, loss, every gradient, parameter counts, and the text about them."""
    check_numbers(name, checkpoints(name), tmp_path)


@pytest.mark.graph
@pytest.mark.parametrize("name", COMPILED)
def test_hf_s_adapter_on_our_compiled_model(name, checkpoints, tmp_path):
    """The same in graph mode, for those whose graphs differ."""
    ms.set_context(mode=ms.GRAPH_MODE)
    check_numbers(name, checkpoints(name), tmp_path)


def check_numbers(name: str, folder: Path, tmp_path: Path) -> None:
    hf = hf_adapter(name, folder)
    save_hf(hf, name, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = PeftModel.from_pretrained(our_base(name, folder), tmp_path, is_trainable=True).set_train(False)
    assert type(mine).__name__ == type(hf).__name__
    assert ours.printed(mine) == theirs.printed(hf)
    (loss, logits, grads), (hf_loss, hf_logits, hf_grads) = our_numbers(mine, name), hf_numbers(hf, name)
    same("model output", logits, hf_logits, "logits")
    same("model output", loss, hf_loss, "loss")
    same_dicts("model gradient", grads, hf_grads)
    assert min(np.abs(g).max() for g in hf_grads.values()) > 0


@each_model
def test_our_adapter_on_hf_s_model(name, checkpoints, tmp_path):
    """HF reads what we save without a warning, means the same layers, and saves the same tensors again."""
    folder = checkpoints(name)
    mine = get_peft_model(our_base(name, folder), LoraConfig(**MODELS[name].lora))
    rng = np.random.default_rng(3)
    for p in mine.trainable_params():
        p.copy_(ms.Tensor(make_weight(p.name, tuple(p.shape), rng)))
    mine.set_train(False).save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf = HfPeftModel.from_pretrained(hf_base(name, folder), tmp_path / "ours", is_trainable=True).eval()
    assert layers(hf, LoraLayer) == layers(mine, TunerLayer)
    (loss, logits, grads), (hf_loss, hf_logits, hf_grads) = our_numbers(mine, name), hf_numbers(hf, name)
    same("model output", logits, hf_logits, "logits")
    same("model output", loss, hf_loss, "loss")
    same_dicts("model gradient", grads, hf_grads)
    save_hf(hf, name, tmp_path / "theirs")
    a, b = (ours.tensors_of(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert sorted(a[0]) == sorted(b[0])
    assert a == b


@each_model
def test_the_same_config_and_keys(name, checkpoints, tmp_path):
    """A fresh adapter of the same config: HF's adapter_config.json, layers, file keys and shapes."""
    folder = checkpoints(name)
    hf = hf_get_peft_model(hf_base(name, folder), HfLoraConfig(**MODELS[name].lora))
    mine = get_peft_model(our_base(name, folder), LoraConfig(**MODELS[name].lora))
    assert layers(hf, LoraLayer) == layers(mine, TunerLayer)
    save_hf(hf, name, tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "ours")
    assert ours.config_in(tmp_path / "ours") == ours.config_in(tmp_path / "theirs")
    a, b = (ours.tensors_of(tmp_path / who / "adapter_model.safetensors")[0] for who in ("ours", "theirs"))
    assert {key: value[:2] for key, value in a.items()} == {key: value[:2] for key, value in b.items()}
    cards = [(tmp_path / who / "README.md").read_text().split("---")[1] for who in ("ours", "theirs")]
    # A folder here is no model on the Hub, which refuses it as base_model: HF writes it all the same.
    told = [
        [line for line in card.splitlines() if str(folder) not in line and line != "- mindspore"] for card in cards
    ]
    assert sorted(told[0]) == sorted(told[1])


def layers(model, layer_class) -> dict[str, tuple[int, float]]:
    tree = model.base_model.model
    walk = tree.named_modules() if isinstance(tree, torch.nn.Module) else tree.cells_and_names()
    return {
        path: (m.r["default"], m.scaling["default"])
        for path, m in walk
        if isinstance(m, layer_class) and hasattr(m, "r")
    }


@pytest.mark.parametrize("name", ["llama", "bert_plain"])
def test_hf_s_auto_classes_load_what_we_save(name, checkpoints, tmp_path):
    """They find the base model by what adapter_config.json says of it: the task, or else class and library."""
    mine = get_peft_model(our_base(name, checkpoints(name)), LoraConfig(**MODELS[name].lora))
    mine.save_pretrained(tmp_path)
    kind = AutoPeftModelForCausalLM if MODELS[name].task else AutoPeftModel
    found = kind.from_pretrained(tmp_path)
    assert type(found.get_base_model()).__name__ == MODELS[name].kind
    assert layers(found, LoraLayer) == layers(mine, TunerLayer)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_embeddings"])
def test_files_that_carry_the_embeddings(name, checkpoints, tmp_path):
    """With save_embedding_layers=True the base's trained or resized embeddings travel along, in both directions."""
    folder = checkpoints(name)
    hf = hf_adapter(name, folder)
    with torch.no_grad():
        for layer in (hf.get_input_embeddings(), hf.get_output_embeddings()):
            getattr(layer, "base_layer", layer).weight.add_(0.3 * torch.randn(30, 16))
    hf.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    mine = PeftModel.from_pretrained(our_base(name, folder), tmp_path / "theirs", is_trainable=True).set_train(False)
    wanted = hf_numbers(hf, name)[1]
    same("model output", our_numbers(mine, name)[1], wanted)
    mine.save_pretrained(tmp_path / "ours", save_embedding_layers=True)
    a, b = (ours.tensors_of(tmp_path / who / "adapter_model.safetensors")[0] for who in ("ours", "theirs"))
    assert a == b
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = HfPeftModel.from_pretrained(hf_base(name, folder), tmp_path / "ours", is_trainable=True).eval()
    same("model output", hf_numbers(again, name)[1], wanted)


@pytest.mark.parametrize(
    "name",
    "llama_tied llama_tied_copies qwen2 qwen3 llama_embeddings llama_tokens llama_dora gpt2 opt_350m bloom".split(),
)
def test_greedy_generation(name, checkpoints, tmp_path):
    """The same tokens with the adapter, without it, and with it merged."""
    check_generation(name, checkpoints(name), tmp_path)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_greedy_generation_in_both_modes(name, mode, checkpoints, tmp_path):
    check_generation(name, checkpoints(name), tmp_path)


def check_generation(name: str, folder: Path, tmp_path: Path) -> None:
    hf = hf_adapter(name, folder)
    save_hf(hf, name, tmp_path)
    mine = PeftModel.from_pretrained(our_base(name, folder), tmp_path)
    data = batch(name)
    # Padded on the left, as generation wants it: the second text is two tokens shorter.
    ids, mask = np.roll(data["input_ids"], 2, 1), np.roll(data["attention_mask"], 2, 1)
    ids[0], mask[0] = data["input_ids"][0], 1
    settings = {"max_new_tokens": 8, "do_sample": False}

    def tokens():
        inputs = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
        with torch.no_grad():
            wanted = hf.generate(**inputs, **settings).numpy()
        found = mine.generate(input_ids=ms.Tensor(ids), attention_mask=ms.Tensor(mask), **settings)
        np.testing.assert_array_equal(found.asnumpy(), wanted)
        return wanted

    adapted = tokens()
    with hf.disable_adapter(), mine.disable_adapter():
        base = tokens()
    assert not np.array_equal(adapted[:, : base.shape[1]], base[:, : adapted.shape[1]])
    hf.merge_adapter()
    mine.merge_adapter()
    np.testing.assert_array_equal(tokens(), adapted)


@pytest.mark.parametrize("name", ["llama_alora", "llama_replicated"])
def test_greedy_generation_with_what_cannot_be_merged(name, mode, checkpoints, tmp_path):
    """The first text has the invocation in it, the second ends with it, the third has none."""
    folder = checkpoints(name)
    hf = hf_adapter(name, folder)
    hf.save_pretrained(tmp_path)
    mine = PeftModel.from_pretrained(our_base(name, folder), tmp_path)
    ids = np.array([[9, 5, 11, 7, 5, 9], [5, 11, 3, 3, 5, 11], [4, 11, 5, 9, 8, 6]], np.int32)
    settings = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        inputs = torch.tensor(ids).long()
        wanted = hf.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **settings).numpy()
    np.testing.assert_array_equal(mine.generate(ms.Tensor(ids), **settings).asnumpy(), wanted)
    drawn = mine.generate(ms.Tensor(ids), do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=6)
    np.testing.assert_array_equal(drawn.asnumpy(), np.repeat(wanted, 2, 0))


def test_a_batch_divided_among_adapters(mode, checkpoints, tmp_path):
    """`adapter_names`: forward and generation, plain adapters and an activated one beside the base, as HF has them."""
    folder = checkpoints("llama")
    configs = {"x": {"target_modules": ["q_proj", "embed_tokens"]}, "y": {"target_modules": ["down_proj"], "r": 2}}
    configs["z"] = {"target_modules": ["q_proj"], "alora_invocation_tokens": [5, 11]}
    hf = None
    for seed, (adapter, config) in enumerate(configs.items()):
        config = HfLoraConfig(task_type="CAUSAL_LM", **config)
        if hf is None:
            hf = hf_get_peft_model(hf_base("llama", folder), config, adapter_name=adapter)
        else:
            hf.add_adapter(adapter, config)
        rng = np.random.default_rng(seed)
        for key, p in hf.named_parameters():
            if adapter in key.split("."):
                p.data = torch.tensor(make_weight(key, tuple(p.shape), rng))
    save_hf(hf.eval(), "llama_embeddings", tmp_path)
    mine = PeftModel.from_pretrained(our_base("llama", folder), tmp_path / "x", adapter_name="x")
    for adapter in "yz":
        mine.load_adapter(tmp_path / adapter, adapter)
    ids = np.array([[9, 5, 11, 7, 5], [5, 11, 3, 5, 11], [4, 11, 5, 9, 8], [9, 5, 11, 7, 5]], np.int32)
    for names in (["x", "z", "__base__", "y"], ["z", "y", "x", "z"]):
        inputs = {"input_ids": torch.tensor(ids).long(), "adapter_names": names}
        with torch.no_grad():
            wanted = hf(**inputs)["logits"].numpy()
        same("model output", mine(ms.Tensor(ids), adapter_names=names)["logits"].asnumpy(), wanted)
        beams = {"num_beams": 2, "pad_token_id": 3}
        plain = ["x" if name == "z" else name for name in names]  # HF has no beams for activated adapters
        for options, chosen in (({}, names), (beams, plain)):
            options |= {"max_new_tokens": 4, "do_sample": False, "adapter_names": chosen}
            with torch.no_grad():
                mask = torch.ones(4, 5)
                tokens = hf.generate(input_ids=inputs["input_ids"], attention_mask=mask, **options).numpy()
            np.testing.assert_array_equal(mine.generate(ms.Tensor(ids), **options).asnumpy(), tokens)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_update_for_tied_embeddings(target, mode, checkpoints, tmp_path):
    """HF's two Parameters in one memory are one Parameter here; the files hold both, and either library reads them."""
    folder, lora = checkpoints("llama_tied"), {"target_modules": [target], "r": 3, "ensure_weight_tying": True}
    hf = hf_get_peft_model(hf_base("llama_tied", folder), HfLoraConfig(task_type="CAUSAL_LM", **lora)).eval()
    rng = np.random.default_rng(1)
    for key, p in hf.named_parameters():
        if "lora_embedding" in key:  # the head's are views on these
            p.data.copy_(torch.tensor(make_weight(key, tuple(p.shape), rng)))
    save_hf(hf, "llama_embeddings", tmp_path / "theirs")
    mine = PeftModel.from_pretrained(our_base("llama_tied", folder), tmp_path / "theirs", is_trainable=True)
    mine.set_train(False)
    assert len(mine.trainable_params()) == 2
    logits, wanted = (numbers(model, "llama_tied")[1] for numbers, model in ((our_numbers, mine), (hf_numbers, hf)))
    same("model output", logits, wanted)
    # The gradient of what is held once is the sum of HF's two.
    grads, theirs_ = our_numbers(mine, "llama_tied")[2], hf_numbers(hf, "llama_tied")[2]
    for table, head in (("lora_embedding_A", "lora_B"), ("lora_embedding_B", "lora_A")):
        total = theirs_[f"base_model.model.model.embed_tokens.{table}"]
        total = total + theirs_[f"base_model.model.lm_head.{head}.weight"].T
        same("model gradient", grads[f"base_model.model.model.embed_tokens.{table}"], total)
    mine.merge_adapter()
    same("model output", our_numbers(mine, "llama_tied")[1], wanted, "merged")
    mine.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=EMBEDDINGS)
        mine.save_pretrained(tmp_path / "ours")
    a, b = (ours.tensors_of(tmp_path / who / "adapter_model.safetensors")[0] for who in ("ours", "theirs"))
    lora_keys = {key for key in b if "lora_" in key}
    assert {key: a[key] for key in lora_keys} == {key: b[key] for key in lora_keys}
    again = HfPeftModel.from_pretrained(hf_base("llama_tied", folder), tmp_path / "ours", is_trainable=True).eval()
    same("model output", hf_numbers(again, "llama_tied")[1], wanted, "HF reads ours")
    (tmp_path / "ours" / "adapter_model.safetensors").unlink()
    third = PeftModel.from_pretrained(our_base("llama_tied", folder), tmp_path / "ours", is_trainable=True)
    same("model output", our_numbers(third.set_train(False), "llama_tied")[1], wanted, "from the ckpt")
