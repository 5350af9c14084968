"""Files and numbers against HF peft, live: what either library writes, the other reads and goes on with."""

import re
import warnings

import mindspore as ms
import numpy as np
import pytest
import torch
from peft import LoraConfig as HfLoraConfig
from peft import PeftModel as HfPeftModel

from msft_peft import LoraConfig, PeftModel, get_peft_model
from tests.cases import layers_of

from . import make_goldens, ours, theirs
from .cases import ALL_CASES, CASES, Case, Record, case, compare, same
from .test_goldens import folder_of, golden

each_case = pytest.mark.parametrize("name", list(ALL_CASES))
SEED = 1  # other weights and batches than the goldens have


def hf_load(the_case: Case, weights, folder, **options) -> HfPeftModel:
    """Let HF load an adapter; every warning is an error, apart from those that HF gives of its own adapters too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups > 1")
        warnings.filterwarnings("ignore", message="Unsupported layer type .*LayerNorm")
        warnings.filterwarnings("ignore", message="Specified to not (save|load)")
        # Our files have RandLoRA's random matrices once, and HF's at each layer again.
        warnings.filterwarnings("ignore", message=r"Found missing adapter keys .*: \['[^']+\.randlora_[AB]\.default'")
        # And Lily's factors at the first of the layers that share them.
        warnings.filterwarnings("ignore", message=r"Found missing adapter keys .*: \['[^']+\.lily_[AB]\.default")
        warnings.filterwarnings("ignore", message="Failed to load the CUDA|Setting boft_n_butterfly_factor to 1")
        module = theirs.build(the_case.net, weights)
        return HfPeftModel.from_pretrained(module, folder, is_trainable=True, **options).eval()


@each_case
def test_hf_writes_and_we_read(name, tmp_path):
    """In PyNative; test_goldens.py does the same in graph mode too."""
    the_case = ALL_CASES[name]
    weights, x, target, hf = theirs.write(the_case, tmp_path, SEED)
    compare(ours.record(ours.load(the_case, weights, tmp_path), x, target, the_case.merges), hf)


@each_case
def test_we_write_and_hf_reads_without_a_warning(name, tmp_path):
    the_case = ALL_CASES[name]
    weights, x, target = theirs.data(the_case, SEED)
    mine = ours.create(the_case, weights, SEED)
    mine.save_pretrained(tmp_path / "ours")
    model = hf_load(the_case, weights, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    compare(ours.record(mine, x, target, the_case.merges), theirs.record(model, x, target, the_case.merges))
    a, b = (ours.tensors_of(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a == (ours.without_copies(b[0]), b[1])
    mine, hf = (ours.config_in(tmp_path / who) for who in ("ours", "theirs"))
    # HF's task classes add their heads to those that the file names already, so that it lists them twice.
    if hf.get("modules_to_save"):
        hf["modules_to_save"] = sorted(set(hf["modules_to_save"]))
    assert mine == hf


@each_case
def test_the_goldens_are_what_hf_makes_today(name, tmp_path):
    the_case = ALL_CASES[name]
    make_goldens.write(the_case, tmp_path / name)
    assert ours.config_in(tmp_path / name) == ours.config_in(folder_of(the_case))
    fresh, kept = (
        ours.tensors_of(folder / "adapter_model.safetensors") for folder in (tmp_path / name, folder_of(the_case))
    )
    assert fresh == kept
    weights, x, target, found = golden(name)
    again = theirs.data(the_case)
    np.testing.assert_array_equal(again[1], x)
    np.testing.assert_array_equal(again[2], target)
    assert all(np.array_equal(again[0][key], value) for key, value in weights.items())
    compare(found, theirs.record(theirs.create(the_case, weights), x, target, the_case.merges))


PAIR = (
    case("pair_a", "mlp", "lin0", "lin1", r=4, lora_alpha=6),
    case("pair_b", "mlp", "lin1", "out", r=2, lora_alpha=3, use_rslora=True),
)


def test_two_adapters(mode, tmp_path):
    """Two of HF's adapters on one net, which overlap on one layer: each alone, both, merged, one deleted."""
    weights, x, _ = theirs.data(PAIR[0], SEED)
    for one, name in zip(PAIR, "ab"):
        theirs.create(one, weights, adapter=name).save_pretrained(tmp_path)
    hf = HfPeftModel.from_pretrained(theirs.build("mlp", weights), tmp_path / "a", adapter_name="a").eval()
    hf.load_adapter(tmp_path / "b", "b")
    mine = PeftModel.from_pretrained(ours.build("mlp", weights), tmp_path / "a", adapter_name="a")
    mine.load_adapter(tmp_path / "b", "b")
    outputs = []

    def both_sides(what, change):
        for model in (hf, mine):
            change(model)
        with torch.no_grad():
            outputs.append(mine(ms.Tensor(x)).asnumpy())
            same("output", outputs[-1], theirs.forward(hf, x), what)

    both_sides("a", lambda model: None)
    both_sides("b", lambda model: model.set_adapter("b"))
    both_sides("a and b", lambda model: model.base_model.set_adapter(["a", "b"]))
    both_sides("b and a", lambda model: model.base_model.set_adapter(["b", "a"]))
    both_sides("both merged", lambda model: model.merge_adapter())
    both_sides("unmerged", lambda model: model.unmerge_adapter())
    both_sides("a merged beside", lambda model: model.merge_adapter(adapter_names=["a"]))
    both_sides("unmerged again", lambda model: model.unmerge_adapter())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both say which adapter becomes active
        both_sides("one deleted", lambda model: (model.set_adapter("b"), model.delete_adapter("b")))
    assert mine.active_adapters == hf.active_adapters == ["a"]
    same("output", outputs[0], outputs[-1])
    assert not np.allclose(outputs[0], outputs[1])
    with hf.disable_adapter(), mine.disable_adapter():
        both_sides("disabled", lambda model: None)
    both_sides("enabled again", lambda model: None)


def test_an_adapter_with_a_name_of_its_own(tmp_path):
    """It goes into a folder of its name, in both libraries, and either loads it under any name."""
    the_case = CASES["linear"]
    weights, x, _ = theirs.data(the_case, SEED)
    hf = theirs.create(the_case, weights, adapter="other")
    hf.save_pretrained(tmp_path / "theirs")
    mine = ours.load(the_case, weights, tmp_path / "theirs" / "other", adapter_name="third")
    mine.save_pretrained(tmp_path / "ours")
    again = hf_load(the_case, weights, tmp_path / "ours" / "third")
    with torch.no_grad():
        same("output", mine(ms.Tensor(x)).asnumpy(), theirs.forward(hf, x))
        same("output", mine(ms.Tensor(x)).asnumpy(), theirs.forward(again, x))
    listing = [sorted(str(p.relative_to(tmp_path / "ours")) for p in (tmp_path / "ours").rglob("*") if p.is_file())]
    assert listing == [
        ["README.md", "third/adapter_config.json", "third/adapter_model.ckpt", "third/adapter_model.safetensors"]
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_place = PeftModel.from_pretrained(ours.build("mlp", weights), tmp_path / "theirs", subfolder="other")
    same("output", same_place(ms.Tensor(x)).asnumpy(), mine(ms.Tensor(x)).asnumpy())


def test_a_dilated_convolution_works_here(tmp_path):
    """HF builds lora_A without the dilation and fails in the sum; ours is held against its own merged weight."""
    net = ms.nn.Conv2d(4, 6, 3, dilation=2, pad_mode="valid", has_bias=True)
    root = ms.nn.SequentialCell(net)
    model = get_peft_model(root, LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
    x = ms.Tensor(np.random.default_rng(0).normal(size=(2, 4, 9, 8)).astype(np.float32))
    before = model.set_train(False)(x).asnumpy()
    with model.disable_adapter():
        assert np.abs(model(x).asnumpy() - before).max() > 0.1
    model.merge_adapter()
    same("output", model(x).asnumpy(), before)
    hf = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, dilation=2))
    hf = theirs.get_peft_model(hf, HfLoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(RuntimeError, match="must match the size"):
        hf(torch.tensor(x.asnumpy()))


# --- what modules_to_save means ------------------------------------------------------------------------------------


class HfNorms(torch.nn.Module):
    """Three norms whose names end alike."""

    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(4, 4)
        self.input_norm = torch.nn.LayerNorm(4)
        self.norm = torch.nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.lin(self.input_norm(x)))


class Norms(ms.nn.Cell):
    def __init__(self):
        super().__init__()
        self.lin = ms.nn.Dense(4, 4)
        self.input_norm = ms.nn.LayerNorm((4,), epsilon=1e-5)
        self.norm = ms.nn.LayerNorm((4,), epsilon=1e-5)

    def construct(self, x):
        return self.norm(self.lin(self.input_norm(x)))


def test_modules_to_save_named_like_the_end_of_others(tmp_path):
    """HF's "norm" means `input_norm` as well. Such a file (LongLoRA's are) must load here and mean the same."""
    torch.manual_seed(0)
    base = HfNorms()
    weights = {key: value.numpy().copy() for key, value in base.state_dict().items()}
    hf = theirs.get_peft_model(base, HfLoraConfig(r=2, target_modules=["lin"], modules_to_save=["norm"]))
    for p in hf.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape)
    hf.save_pretrained(tmp_path)
    mine = Norms()
    for name, p in mine.parameters_and_names():
        p.set_data(ms.Tensor(weights[ours.torch_key(name)]))
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    mine = PeftModel.from_pretrained(mine, tmp_path)
    with torch.no_grad():
        same("output", mine(ms.Tensor(x)).asnumpy(), hf.eval()(torch.tensor(x)))


# --- half precision ------------------------------------------------------------------------------------------------

HALVES = {"float16": (torch.float16, ms.float16), "bfloat16": (torch.bfloat16, ms.bfloat16)}


def half_cell(net: str, weights, dtype) -> ms.nn.Cell:
    cell = ours.build(net, weights)
    for p in cell.get_parameters():
        p.set_dtype(dtype)
    return cell


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d", "blocks_modules_to_save", "linear_bias_all"])
@pytest.mark.parametrize("dtype", list(HALVES))
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_half_precision_keeps_its_bits(name, dtype, suffix, tmp_path):
    """With autocast_adapter_dtype=False an adapter stays in half precision: HF -> ours -> HF, the same bits."""
    the_case, (hf_dtype, ms_dtype) = CASES[name], HALVES[dtype]
    weights, _, _ = theirs.data(the_case, SEED)
    folders = [tmp_path / who for who in ("theirs", "ours", "again")]
    hf = theirs.get_peft_model(
        theirs.build(the_case.net, weights).to(hf_dtype),
        HfLoraConfig(**the_case.config),
        autocast_adapter_dtype=False,
    )
    for p in hf.parameters():
        if p.requires_grad:
            p.data = (0.3 * torch.randn(p.shape)).to(hf_dtype)
    hf.save_pretrained(folders[0])

    def through_ours(source, target):
        mine = half_cell(the_case.net, weights, ms_dtype)
        PeftModel.from_pretrained(mine, source, autocast_adapter_dtype=False).save_pretrained(target)

    through_ours(folders[0], folders[1])
    if suffix == "ckpt":  # once more, from MindSpore's own format
        (folders[1] / "adapter_model.safetensors").unlink()
        through_ours(folders[1], folders[1])
    module = theirs.build(the_case.net, weights).to(hf_dtype)
    HfPeftModel.from_pretrained(module, folders[1], autocast_adapter_dtype=False).save_pretrained(folders[2])
    first, second, third = (ours.tensors_of(folder / "adapter_model.safetensors") for folder in folders)
    assert {kind for kind, _, _ in first[0].values()} == {"F16" if dtype == "float16" else "BF16"}
    assert first == second == third


@pytest.mark.parametrize("name", ["linear", "embedding", "blocks_modules_to_save"])
@pytest.mark.parametrize("dtype", list(HALVES))
def test_half_precision_bases_get_float32_adapters(name, dtype, tmp_path):
    """By default adapters on a half-precision base are kept, and saved, in float32; heads too, as far as HF's are."""
    the_case, (hf_dtype, ms_dtype) = CASES[name], HALVES[dtype]
    weights, _, _ = theirs.data(the_case, SEED)
    module = theirs.build(the_case.net, weights).to(hf_dtype)
    hf = theirs.get_peft_model(module, HfLoraConfig(**the_case.config))
    hf.save_pretrained(tmp_path / "theirs")
    mine = PeftModel.from_pretrained(half_cell(the_case.net, weights, ms_dtype), tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "ours")
    a, b = (ours.tensors_of(tmp_path / who / "adapter_model.safetensors")[0] for who in ("ours", "theirs"))
    assert {key: kind for key, (kind, _, _) in a.items()} == {key: kind for key, (kind, _, _) in b.items()}
    assert a == b


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_float16_outputs(name, autocast, mode, tmp_path):
    """The base runs in float16, the adapter in float32 or float16; the output is float16 in both libraries."""
    the_case = CASES[name]
    weights, x, _ = theirs.data(the_case, SEED)
    theirs.create(the_case, weights, SEED).save_pretrained(tmp_path)
    module = theirs.build(the_case.net, weights).half()
    hf = HfPeftModel.from_pretrained(module, tmp_path, autocast_adapter_dtype=autocast).eval()
    mine = half_cell(the_case.net, weights, ms.float16)
    mine = PeftModel.from_pretrained(mine, tmp_path, autocast_adapter_dtype=autocast)
    batch = x if x.dtype == np.int32 else x.astype(np.float16)
    with torch.no_grad():
        wanted = theirs.forward(hf, batch)
    found = mine(ms.Tensor(batch))
    assert (found.dtype, wanted.dtype) == (ms.float16, torch.float16)
    same("half", found.asnumpy().astype(np.float32), wanted.float())
    merged, hf_merged = ours.weights_of(mine.merge_and_unload()), hf.merge_and_unload().state_dict()
    for key, value in merged.items():
        assert value.dtype == np.float16
        same("half", value.astype(np.float32), hf_merged[key].float(), key)


# --- the model card and the folder ---------------------------------------------------------------------------------


def test_the_folder_holds_what_hf_writes_and_the_checkpoint(tmp_path):
    the_case = CASES["linear"]
    weights, _, _ = theirs.data(the_case, SEED)
    theirs.create(the_case, weights).save_pretrained(tmp_path / "theirs")
    ours.create(the_case, weights).save_pretrained(tmp_path / "ours")
    listing = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == listing | {"adapter_model.ckpt"}
    cards = [(tmp_path / who / "README.md").read_text() for who in ("ours", "theirs")]
    for card in cards:
        assert re.search(r"^library_name: peft$", card, re.MULTILINE)
        assert "- PEFT 0.21.2" in card


def test_a_broken_scaling_would_be_seen():
    """The comparison itself: an output from a scaling that is 1 % off is no match."""
    weights, x, target, found = golden("linear")
    model = ours.load(CASES["linear"], weights, folder_of(CASES["linear"]))
    for layer in layers_of(model):
        layer.scale_layer(1.01)
    with pytest.raises(AssertionError, match="output"):
        compare(ours.record(model, x, target), Record(**vars(found)))
