"""Prompt methods against HF peft on transformers' models, live: every method on every task that HF has it for."""

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
import transformers
from mindspore import nn
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import msft_peft
from msft_peft import models
from msft_peft.hosts import tokenizers

from . import ours, theirs
from .cases import make_weight, same, same_dicts
from .test_live_models import DECODER, ENCODER

N = {"num_virtual_tokens": 3}
EXAMPLES = {"cpt_token_ids": [5, 6, 7, 8, 9], "cpt_mask": [1] * 5, "cpt_tokens_type_mask": [1, 2, 3, 4, 0]}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", N),
    "mlp": ("PromptEncoderConfig", {**N, "encoder_hidden_size": 6}),
    "lstm": ("PromptEncoderConfig", {**N, "encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"}),
    "prefix": ("PrefixTuningConfig", N),
    "projected": ("PrefixTuningConfig", {**N, "prefix_projection": True, "encoder_hidden_size": 6}),
    "cartridge": ("CartridgeConfig", N),
    "multitask": ("MultitaskPromptTuningConfig", {**N, "num_tasks": 2, "num_ranks": 2}),
    "cpt": ("CPTConfig", {**EXAMPLES, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7}),
}
T5 = {"vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 3, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
GPT2 = {"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
GPT2 |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_implementation": "eager"}
OPT = {"vocab_size": 30, "hidden_size": 16, "ffn_dim": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"max_position_embeddings": 32, "word_embed_proj_dim": 16, "dropout": 0.0, "attn_implementation": "eager"}
BLOOM = {"vocab_size": 30, "hidden_size": 16, "n_layer": 2, "n_head": 4}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "CAUSAL_LM", DECODER),
    "llama_cls": ("LlamaForSequenceClassification", "SEQ_CLS", DECODER | {"num_labels": 3}),
    "bert_cls": ("BertForSequenceClassification", "SEQ_CLS", ENCODER | {"num_labels": 3}),
    "bert_tokens": ("BertForTokenClassification", "TOKEN_CLS", ENCODER | {"num_labels": 3}),
    "bert_qa": ("BertForQuestionAnswering", "QUESTION_ANS", ENCODER),
    "bert": ("BertModel", "FEATURE_EXTRACTION", ENCODER),
    "t5": ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM", T5),
    "gpt2": ("GPT2LMHeadModel", "CAUSAL_LM", GPT2),
    "opt": ("OPTForCausalLM", "CAUSAL_LM", OPT),
    "bloom": ("BloomForCausalLM", "CAUSAL_LM", BLOOM),
}
# What differs between decoders is where they take embeddings and keys and values from.
FEW = {"gpt2": ("prompt", "prefix"), "opt": ("prompt", "prefix"), "bloom": ("prompt", "prefix")}
COMPILED = [("llama", "prompt"), ("llama", "prefix"), ("bert_cls", "mlp")]
# HF gives these no task_ids, which multitask prompt tuning cannot do without.
TASKLESS = ("QUESTION_ANS", "FEATURE_EXTRACTION")
CASES = [
    (model, method)
    for model, (_, task, _) in MODELS.items()
    for method in FEW.get(model, METHODS)
    if (method != "cpt" or task == "CAUSAL_LM") and (method != "multitask" or task not in TASKLESS)
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder of a model's checkpoint, written by transformers; made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def folder(name: str) -> Path:
        kind, _, settings = MODELS[name]
        kind = getattr(transformers, kind)
        module, rng = kind(kind.config_class(**settings)), np.random.default_rng(0)
        with torch.no_grad():
            for key, p in module.named_parameters():
                p.copy_(torch.tensor(make_weight(key.replace("LayerNorm", "norm"), tuple(p.shape), rng)))
        module.save_pretrained(root / name)
        return root / name

    return folder


def hf_base(name: str, folder: Path):
    settings = {"attn_implementation": "eager"}
    return getattr(transformers, MODELS[name][0]).from_pretrained(folder, **settings).eval()


def our_base(name: str, folder: Path) -> nn.Cell:
    return getattr(models, MODELS[name][0]).from_pretrained(folder)


def config(library: Any, model: str, method: str, **changes: Any):
    kind, settings = METHODS[method]
    return getattr(library, kind)(task_type=MODELS[model][1], **settings | changes)


def hf_adapter(model: str, method: str, folder: Path):
    """HF's model with an adapter whose weights are random."""
    found = peft.get_peft_model(hf_base(model, folder), config(peft, model, method)).eval()
    rng = np.random.default_rng(1)
    for name, p in found.named_parameters():
        if p.requires_grad or "frozen" in name:
            p.data = torch.tensor(0.5 * rng.standard_normal(tuple(p.shape)).astype(np.float32))
    return found


def our_adapter(model: str, method: str, folder: Path, hf: torch.nn.Module) -> msft_peft.PeftModel:
    """Ours, with the same weights under the same names."""
    found = msft_peft.get_peft_model(our_base(model, folder), config(msft_peft, model, method)).set_train(False)
    trained = {name for name, p in hf.named_parameters() if p.requires_grad}
    assert trained == {p.name for p in found.trainable_params()}
    weights = {name: p.detach().numpy() for name, p in hf.named_parameters() if name.startswith("prompt_encoder.")}
    weights |= {name: p.detach().numpy() for name, p in hf.named_parameters() if name in trained}
    for p in found.get_parameters():
        if p.name in weights:
            p.copy_(ms.Tensor(weights[p.name]))
    return found


def batch(model: str, method: str) -> dict[str, np.ndarray]:
    """Two texts, the second padded at its end, and what the task and the method want beside them."""
    task = MODELS[model][1]
    rng = np.random.default_rng(2)
    ids = rng.integers(3, 30, (2, 6)).astype(np.int32)
    mask = np.ones((2, 6), np.int32)
    ids[1, 4:], mask[1, 4:] = 0, 0
    found = {"input_ids": ids, "attention_mask": mask}
    if method == "multitask":
        found["task_ids"] = np.array([1, 0], np.int32)
    if method == "cpt":
        found["input_type_mask"] = np.array([[1, 2, 2, 3, 4, 4], [1, 2, 4, 8, 0, 0]], np.int32)
    if task == "QUESTION_ANS":
        return found | {"start_positions": np.array([1, 2], np.int32), "end_positions": np.array([3, 3], np.int32)}
    if task == "SEQ_CLS":
        return found | {"labels": np.array([2, 0], np.int32)}
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return found | {"labels": np.where(mask == 1, ids, -100).astype(np.int32)}
    # HF pads no labels for token classification; there the loss is ours alone.
    if task == "TOKEN_CLS" and method in ("prefix", "projected", "cartridge"):
        return found | {"labels": np.where(mask == 1, ids % 3, -100).astype(np.int32)}
    return found


def result(outputs: Any) -> Any:
    """(loss, logits), a loss of our own where the model has none."""
    if "start_logits" in outputs:
        logits = outputs["start_logits"] + 2 * outputs["end_logits"]
        return (outputs["loss"] if "loss" in outputs else logits.mean()), logits
    if "last_hidden_state" in outputs:
        return (outputs["last_hidden_state"] ** 2).mean(), outputs["last_hidden_state"]
    if "loss" in outputs:
        return outputs["loss"], outputs["logits"]
    return (outputs["logits"] ** 2).mean(), outputs["logits"]


class Result(nn.Cell):
    def __init__(self, model: nn.Cell, names: tuple[str, ...]):
        super().__init__(auto_prefix=False)
        self.model, self.names = model, names

    def construct(self, *columns):
        named = {}
        for i in range(len(columns)):
            named[self.names[i]] = columns[i]
        return result(self.model(**named))


def our_numbers(model: msft_peft.PeftModel, inputs: dict[str, np.ndarray]):
    params = model.trainable_params()
    step = ms.value_and_grad(Result(model, tuple(inputs)), None, params, has_aux=True)

    def call(*columns):
        return step(*columns)

    run = ms.jit(call) if ms.get_context("mode") == ms.GRAPH_MODE else call
    (loss, logits), grads = run(*[ms.Tensor(value) for value in inputs.values()])
    return loss.asnumpy(), logits.asnumpy(), {p.name: g.asnumpy() for p, g in zip(params, grads)}


def as_torch(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(value).long() for key, value in inputs.items()}


def hf_numbers(model: torch.nn.Module, inputs: dict[str, np.ndarray]):
    model.zero_grad()
    outputs = model(**as_torch(inputs))
    loss, logits = result({key: value for key, value in outputs.items() if value is not None})
    loss.backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach().numpy(), logits.detach().numpy(), grads


def our_logits(model: msft_peft.PeftModel, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return result(model(**{key: ms.Tensor(value) for key, value in inputs.items()}))[1].asnumpy()


def check_numbers(model: str, method: str, folder: Path) -> tuple[Any, Any]:
    hf = hf_adapter(model, method, folder)
    mine = our_adapter(model, method, folder, hf)
    assert type(mine).__name__ == type(hf).__name__
    assert ours.printed(mine) == theirs.printed(hf)
    inputs = batch(model, method)
    (loss, logits, grads), (hf_loss, hf_logits, hf_grads) = our_numbers(mine, inputs), hf_numbers(hf, inputs)
    same("model output", logits, hf_logits, "logits")
    same("model output", loss, hf_loss, "loss")
    same_dicts("model gradient", grads, hf_grads)
    assert max(np.abs(g).max() for g in hf_grads.values()) > 1e-3
    return hf, mine


@pytest.mark.parametrize(("model", "method"), CASES)
def test_numbers_and_files(model, method, checkpoints, tmp_path):
    """Names, counts, logits, loss, every gradient; then each library reads what the other wrote."""
    folder = checkpoints(model)
    hf, mine = check_numbers(model, method, folder)
    inputs = batch(model, method)
    wanted = ("input_ids", "attention_mask", "task_ids", *(("labels",) if model == "t5" else ()))
    inputs = {key: inputs[key] for key in inputs if key in wanted}
    with torch.no_grad():
        logits = result({"loss": 0} | dict(hf(**as_torch(inputs))))[1].numpy()
    hf.save_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = msft_peft.PeftModel.from_pretrained(our_base(model, folder), tmp_path / "theirs")
        back = peft.PeftModel.from_pretrained(hf_base(model, folder), tmp_path / "ours").eval()
    assert read.load_report.faults() == []
    same("model output", our_logits(read, inputs), logits, "read from HF")
    with torch.no_grad():
        same("model output", result({"loss": 0} | dict(back(**as_torch(inputs))))[1].numpy(), logits, "read by HF")
    a, b = (ours.tensors_of(tmp_path / who / "adapter_model.safetensors")[0] for who in ("ours", "theirs"))
    assert {key: value[:2] for key, value in a.items()} == {key: value[:2] for key, value in b.items()}
    one, other = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    for said in (one, other):  # HF lists the heads once more
        said["modules_to_save"] = sorted(set(said["modules_to_save"] or []))
    assert one == other


@pytest.mark.graph
@pytest.mark.parametrize(("model", "method"), COMPILED)
def test_numbers_of_compiled_models(model, method, checkpoints):
    folder = checkpoints(model)
    ms.set_context(mode=ms.GRAPH_MODE)
    check_numbers(model, method, folder)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_greedy_tokens(method, checkpoints):
    """Of a batch that is padded on the left, by arguments with and without names."""
    folder = checkpoints("llama")
    hf = hf_adapter("llama", method, folder)
    mine = our_adapter("llama", method, folder, hf)
    ids = np.random.default_rng(4).integers(3, 30, (2, 6)).astype(np.int32)
    mask = np.array([[0, 0, 1, 1, 1, 1], [1] * 6], np.int32)
    tasks = {"task_ids": np.array([0, 1])} if method == "multitask" else {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        told = {key: torch.tensor(value) for key, value in tasks.items()}
        more = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
        wanted = hf.generate(torch.tensor(ids).long(), attention_mask=torch.tensor(mask), **more, **told).numpy()
    told = {key: ms.Tensor(value.astype(np.int32)) for key, value in tasks.items()}
    more = {"max_new_tokens": 7, "eos_token_id": []}
    assert mine.generate(ms.Tensor(ids), attention_mask=ms.Tensor(mask), **more, **told).asnumpy().tolist() == (
        wanted.tolist()
    )
    found = mine.generate(input_ids=ids, attention_mask=mask, max_length=13, eos_token_id=[], **told)
    assert found.asnumpy().tolist() == wanted.tolist()
    with mine.disable_adapter(), hf.disable_adapter(), torch.no_grad():
        base = hf.generate(torch.tensor(ids).long(), max_new_tokens=7, do_sample=False, eos_token_id=None).numpy()
        assert mine.generate(ids, max_new_tokens=7, eos_token_id=[]).asnumpy().tolist() == base.tolist()


@pytest.mark.parametrize("method", ["prompt", "mlp", "multitask"])
def test_the_same_greedy_answers(method, checkpoints):
    """Of an encoder-decoder behind virtual tokens; behind a prefix HF hides most of it from the first tokens."""
    folder = checkpoints("t5")
    hf = hf_adapter("t5", method, folder)
    mine = our_adapter("t5", method, folder, hf)
    inputs = {key: value for key, value in batch("t5", method).items() if key != "labels"}
    with torch.no_grad():
        wanted = hf.generate(**as_torch(inputs), max_new_tokens=6, do_sample=False).numpy()
    inputs = {key: ms.Tensor(value) for key, value in inputs.items()}
    assert mine.generate(**inputs, max_new_tokens=6).asnumpy().tolist() == wanted.tolist()


@pytest.mark.parametrize("model", ["bert_cls", "bert_tokens"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_types_and_positions_of_tokens(model, method, checkpoints):
    folder = checkpoints(model)
    hf = hf_adapter(model, method, folder)
    mine = our_adapter(model, method, folder, hf)
    inputs = {key: value for key, value in batch(model, method).items() if key in ("input_ids", "attention_mask")}
    inputs |= {"token_type_ids": np.array([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]], np.int32)}
    inputs |= {"position_ids": np.array([[3, 4, 5, 6, 7, 9]], np.int32)}
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        wanted = hf(**as_torch(inputs)).logits.numpy()
        found = our_logits(mine, inputs)
    same("model output", found, wanted)
    said = [str(w.message) for w in caught if "Ignoring" in str(w.message)]
    assert len(said) == 2 * (method == "prompt")
    assert len(set(said)) <= 1


@pytest.mark.parametrize("heads", [(4, 6), (2, 6), (2, None)])
def test_sizes_of_a_prefix_where_heads_are_shared(heads):
    keys, dim = heads
    settings = DECODER | {"num_key_value_heads": keys, "head_dim": dim}
    settings = {key: value for key, value in settings.items() if value is not None}
    hf = peft.get_peft_model(
        transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{"head_dim": 4} | settings)),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", **N),
    ).peft_config["default"]
    mine = msft_peft.get_peft_model(
        models.Qwen3ForCausalLM(models.Qwen3Config(**{"head_dim": 4} | settings)),
        msft_peft.PrefixTuningConfig(task_type="CAUSAL_LM", **N),
    ).peft_config["default"]
    fields = ("token_dim", "num_attention_heads", "num_layers", "encoder_hidden_size", "num_transformer_submodules")
    assert [getattr(mine, name) for name in fields] == [getattr(hf, name) for name in fields]


@pytest.mark.parametrize(
    ("init", "kind"),
    [("AVERAGE_SOURCE_TASKS", "safetensors"), ("EXACT_SOURCE_TASK", "bin"), ("ONLY_SOURCE_SHARED", "safetensors")],
)
def test_multitask_prompts_begin_from_others(init, kind, checkpoints, tmp_path):
    folder = checkpoints("llama")
    hf_adapter("llama", "multitask", folder).save_pretrained(tmp_path, safe_serialization=kind == "safetensors")
    path = str(tmp_path / f"adapter_model.{kind}")
    more = {"num_tasks": 1, "prompt_tuning_init": init, "prompt_tuning_init_task": 1}
    more |= {"prompt_tuning_init_state_dict_path": path}
    hf = peft.get_peft_model(hf_base("llama", folder), config(peft, "llama", "multitask", **more))
    mine = msft_peft.get_peft_model(our_base("llama", folder), config(msft_peft, "llama", "multitask", **more))
    wanted = {name: p.detach().numpy() for name, p in hf.named_parameters() if p.requires_grad}
    found = {p.name: p.asnumpy() for p in mine.trainable_params()}
    if init == "ONLY_SOURCE_SHARED":  # the factors are drawn
        key = "prompt_encoder.default.embedding.weight"
        wanted, found = {key: wanted[key]}, {key: found[key]}
    same_dicts("weight", found, wanted)


@pytest.mark.parametrize("n", [2, 5])
def test_prompts_begin_as_a_text(n, checkpoints, tmp_path):
    """Through a tokenizer's folder, as in HF, and through tokenizers given as they are."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    raw = Tokenizer(WordLevel({word: i for i, word in enumerate("_ [UNK] x label this text".split())}, "[UNK]"))
    raw.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]").save_pretrained(tmp_path)
    folder = checkpoints("llama")
    text = {"num_virtual_tokens": n, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "label this text"}
    hf = peft.get_peft_model(
        hf_base("llama", folder), config(peft, "llama", "prompt", **text, tokenizer_name_or_path=str(tmp_path))
    )
    wanted = hf.prompt_encoder["default"].embedding.weight.detach().numpy()
    given = (str(tmp_path), raw, transformers.AutoTokenizer.from_pretrained(tmp_path), lambda words: [3, 4, 5])
    for tokenizer in given:
        settings = config(msft_peft, "llama", "prompt", **text, tokenizer_name_or_path=tokenizer)
        mine = msft_peft.get_peft_model(our_base("llama", folder), settings)
        same("weight", mine.prompt_encoder["default"].embedding.weight.asnumpy(), wanted)
        json.loads(mine.peft_config["default"].to_json())


def test_a_trajectory_of_cpt(checkpoints):
    """Its projection moves the weights themselves: three steps of SGD end at the same place."""
    folder = checkpoints("llama")
    hf = hf_adapter("llama", "cpt", folder)
    mine = our_adapter("llama", "cpt", folder, hf)
    inputs, rate = batch("llama", "cpt"), 0.5
    (p,) = [p for p in hf.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p], rate)
    for _ in range(3):
        hf_numbers(hf.train(), inputs)
        optimizer.step()
    descend = nn.SGD(mine.trainable_params(), rate)
    step = ms.value_and_grad(Result(mine.set_train(True), tuple(inputs)), None, descend.parameters, has_aux=True)
    for _ in range(3):
        _, grads = step(*[ms.Tensor(value) for value in inputs.values()])
        descend(grads)
    same("trajectory", mine.trainable_params()[0].asnumpy(), p.detach().numpy())


@pytest.mark.parametrize("method", ["cartridge", "prefix"])
def test_a_prefix_that_begins_as_a_text(method, checkpoints):
    """Either library runs the base model over it, and takes the first of the keys and values."""
    folder, text = checkpoints("llama"), [4, 9, 3, 7, 20, 11]
    hf = hf_adapter("llama", method, folder)
    mine = our_adapter("llama", method, folder, hf)
    ids = lambda text, **_: {"input_ids": torch.tensor([text])}  # noqa: E731
    wanted = peft.initialize_kv_prefix_from_text(hf, ids, text=text)
    found = msft_peft.initialize_kv_prefix_from_text(mine, list, text=text)
    same("model output", found.asnumpy(), wanted.detach().numpy())
    begun = hf.prompt_encoder["default"].embedding.weight.detach().numpy()
    same("model output", mine.prompt_encoder["default"].rows(), begun)
    # After its own beginning the model says of the rest what it says of the whole.
    rest = {"input_ids": np.array([text[3:]], np.int32)}
    with mine.disable_adapter():
        whole = our_logits(mine, {"input_ids": np.array([text], np.int32)})
    same("model output", our_logits(mine, rest), whole[:, 3:])
    with torch.no_grad():
        same("model output", our_logits(mine, rest), hf(**as_torch(rest)).logits.numpy())


def test_cartridges_in_a_row(checkpoints, tmp_path):
    folder = checkpoints("llama")
    for name in ("a", "b"):
        model = hf_adapter("llama", "cartridge", folder)
        shift = {"a": 0.0, "b": 1.0}[name]
        model.prompt_encoder["default"].load_prompt_embeddings(model.prompt_encoder["default"].weight + shift)
        model.save_pretrained(tmp_path / name)
    paths = [tmp_path / "a", tmp_path / "b"]
    peft.compose_cartridge_adapters(paths, output_path=tmp_path / "theirs")
    msft_peft.compose_cartridge_adapters(paths, output_path=tmp_path / "ours")
    one, two = (ours.tensors_of(tmp_path / who / "adapter_model.safetensors")[0] for who in ("ours", "theirs"))
    assert one == two
    assert ours.config_in(tmp_path / "ours") == ours.config_in(tmp_path / "theirs")
    mine = msft_peft.PeftModel.from_pretrained(our_base("llama", folder), tmp_path / "theirs")
    hf = peft.PeftModel.from_pretrained(hf_base("llama", folder), tmp_path / "ours").eval()
    with torch.no_grad():
        inputs = batch("llama", "cartridge")
        same("model output", our_logits(mine, inputs), hf(**as_torch(inputs)).logits.numpy())


REFUSED = {
    "frozen": lambda library, m: library.CartridgeConfig(num_frozen_tokens=-1),
    "all frozen": lambda library, m: library.CartridgeConfig(num_virtual_tokens=2, num_frozen_tokens=3),
    "no prefix": lambda library, m: library.initialize_kv_prefix_from_past_key_values(m, past_key_values=()),
    "no cache": lambda library, m: library.prompt_embeddings_from_past_key_values(3, num_virtual_tokens=1),
    "empty cache": lambda library, m: library.prompt_embeddings_from_past_key_values((), num_virtual_tokens=1),
    "one cartridge": lambda library, m: library.compose_cartridge_adapters(["a"], output_path="b"),
    "other type": lambda library, m: m.add_adapter("b", library.PromptEncoderConfig(task_type="CAUSAL_LM", **N)),
    "lora": lambda library, m: m.add_adapter("b", library.LoraConfig(task_type="CAUSAL_LM")),
    "taken": lambda library, m: m.add_adapter("default", library.PromptTuningConfig(task_type="CAUSAL_LM", **N)),
    "unknown": lambda library, m: m.set_adapter("b"),
    "delete": lambda library, m: m.delete_adapter("b"),
    "merge": lambda library, m: m.merge_and_unload(),
    "unload": lambda library, m: m.unload(),
    "status": lambda library, m: m.get_layer_status(),
    "text": lambda library, m: library.PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="a"),
    "kwargs": lambda library, m: library.PromptTuningConfig(tokenizer_kwargs={"a": 1}),
    "cpt": lambda library, m: library.CPTConfig(task_type="SEQ_CLS"),
    "cpt lengths": lambda library, m: library.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1]),
    "no source": lambda library, m: library.get_peft_model(
        m.get_base_model(),
        library.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", prompt_tuning_init="EXACT_SOURCE_TASK", **N),
    ),
    "inject": lambda library, m: library.inject_adapter_in_model(library.PromptTuningConfig(**N), m.get_base_model()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_hf_refuses(name, checkpoints):
    """The same built-in kind of error, from either library."""
    folder, kinds = checkpoints("llama"), []
    for library, base in ((peft, hf_base), (msft_peft, our_base)):
        model = library.get_peft_model(base("llama", folder), config(library, "llama", "prompt"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(Exception) as caught:  # noqa: PT011
                REFUSED[name](library, model)
        kinds.append(next(kind for kind in type(caught.value).__mro__ if kind.__module__ == "builtins"))
    assert kinds[0] is kinds[1]


def test_a_tokenizer_file_needs_no_transformers(monkeypatch, tmp_path):
    there = {"transformers": None, "tokenizers": object()}
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", there.get)
    with pytest.raises(ValueError, match=r"has no tokenizer.json, and transformers is not installed"):
        tokenizers.encode(tmp_path, "text")
    Tokenizer(WordLevel({"text": 3, "?": 0}, "?")).save(str(tmp_path / "tokenizer.json"))
    assert tokenizers.encode(str(tmp_path), "text") == [3]
