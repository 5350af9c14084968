"""What is compared: nets, configs, inputs and tolerances. No torch and no MindSpore in here."""

import re
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# One table for the whole suite. float32 on both sides; the sums are short, so a few ulps are all that may differ.
TOLERANCES: dict[str, dict[str, float]] = {
    "output": {"atol": 1e-5, "rtol": 1e-5},
    "loss": {"atol": 1e-5, "rtol": 1e-5},
    "gradient": {"atol": 1e-5, "rtol": 1e-5},
    "weight": {"atol": 1e-6, "rtol": 1e-6},
    "unmerge": {"atol": 2e-7, "rtol": 2e-7},
    "half": {"atol": 4e-3, "rtol": 4e-3},
    # Whole language models: more and longer sums, and ops.exp in MindSpore has a relative error of 5e-6.
    "model output": {"atol": 5e-5, "rtol": 5e-5},
    "model gradient": {"atol": 5e-5, "rtol": 5e-4},
    "trajectory": {"atol": 1e-4, "rtol": 1e-4},
}


def same(kind: str, ours: Any, theirs: Any, what: str = "") -> None:
    """Assert that whole tensors agree within the tolerance of their kind."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, f"{what or kind}: shape {ours.shape}, HF has {theirs.shape}"
    np.testing.assert_allclose(ours, theirs, **TOLERANCES[kind], err_msg=what or kind)


def same_dicts(kind: str, ours: dict[str, Any], theirs: dict[str, Any], what: str = "") -> None:
    """Assert that two sets of named tensors have the same names and agree."""
    assert sorted(ours) == sorted(theirs), f"{what or kind}: {set(ours) ^ set(theirs)} on one side only"
    for name, value in ours.items():
        same(kind, value, theirs[name], f"{what or kind} {name}")


@dataclass(frozen=True)
class Case:
    """A net and a config.

    Attributes:
        name: also the golden's folder.
        net: name of the net in `cells.NETS` and `modules.NETS`.
        config: its arguments.
        merges: False where neither library can merge.
        method: of the config's class, without "Config".
    """

    name: str
    net: str
    config: dict[str, Any] = field(hash=False)
    merges: bool = True
    method: str = "Lora"

    def rng(self, seed: int = 0) -> np.random.Generator:
        return np.random.default_rng([zlib.crc32(self.name.encode()), seed])


def case(name: str, net: str, *targets: str, merges: bool = True, **config: Any) -> Case:
    defaults = {"r": 4, "lora_alpha": 6}
    return Case(name, net, defaults | ({"target_modules": list(targets)} if targets else {}) | config, merges)


BLOCKS = {"target_modules_bd_a": ["lin0"], "target_modules_bd_b": ["lin1"], "nblocks": 2}
MONTE = {"num_samples": 3, "use_entropy": True, "sample_scaler": 0.3, "kl_loss_weight": 0.01, "buffer_size": 2}
MIXED = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["up"], "nblocks": 2, "match_strict": False}
CASES = {
    c.name: c
    for c in [
        case("linear", "mlp", "lin0", "lin1"),
        case("linear_rslora", "mlp", "lin0", "out", r=3, use_rslora=True),
        case("linear_bias_all", "mlp", "lin0", bias="all"),
        case("linear_bias_lora_only", "mlp", "lin0", "lin1", bias="lora_only"),
        case(
            "linear_patterns",
            "mlp",
            "lin0",
            "lin1",
            "out",
            rank_pattern={"lin[1]": 2, "out": 3},
            alpha_pattern={"lin0": 9, "o.t": 2},
            init_lora_weights="gaussian",
        ),
        case("linear_regex", "mlp", target_modules="lin.|out", exclude_modules=["lin1"], lora_dropout=0.25),
        case("linear_init_false", "mlp", "lin1", init_lora_weights=False, lora_alpha=3),
        case("dense_activation", "dense_activation", "lin0", "out"),
        case("mint_linear", "mint_linear", "lin0", "out"),
        case("embedding", "embedding", "emb", "lin"),
        case("conv1d", "conv1d", "conv0", "lin"),
        case("conv1d_groups", "conv1d", "conv1", merges=False),
        case("conv2d", "conv2d", "conv0", "lin"),
        case("conv2d_groups", "conv2d", "conv0", "conv1", merges=False),
        case("conv2d_same", "conv2d_same", "conv0", "conv1", r=2),
        case("conv3d", "conv3d", "conv0"),
        case("conv3d_groups", "conv3d", "conv1", r=2, merges=False),
        case("hf_conv1d", "gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
        case("blocks_layers", "blocks", "q_proj", "v_proj", layers_to_transform=[1], layers_pattern="layers"),
        case("blocks_all_linear", "blocks", target_modules="all-linear", r=2),
        case("blocks_modules_to_save", "blocks", "q_proj", modules_to_save=["classifier", "norm", "embed_tokens"]),
        case("blocks_seq_cls", "blocks", "v_proj", task_type="SEQ_CLS"),
        case("blocks_token_cls_bias", "blocks", "up", "down", task_type="TOKEN_CLS", bias="lora_only", r=2),
        case("blocks_feature", "blocks", "k_proj", "embed_tokens", task_type="FEATURE_EXTRACTION"),
        case("dora", "mlp", "lin0", "lin1", "out", use_dora=True),
        case("dora_dropout_rslora", "mlp", "lin0", use_dora=True, use_rslora=True, bias="all", lora_dropout=0.5),
        case("dora_init_false", "mlp", "lin1", use_dora=True, init_lora_weights=False),
        case("dora_embedding", "embedding", "emb", "lin", use_dora=True),
        case("dora_conv1d", "conv1d", "conv0", use_dora=True),
        case("dora_conv2d", "conv2d", "conv0", use_dora=True),
        case("dora_conv3d", "conv3d", "conv0", use_dora=True),
        case("dora_hf_conv1d", "gpt2", "c_attn", "c_proj", use_dora=True, fan_in_fan_out=True),
        case("bdlora", "mlp", "lin0", "lin1", use_bdlora=BLOCKS, lora_dropout=0.5),
        case("bdlora_patterns", "blocks", "q_proj", "up", "k_proj", use_bdlora=MIXED, rank_pattern={"up": 2}, r=6),
        case("bdlora_bias", "mlp", "lin0", use_bdlora=BLOCKS, lora_bias=True, use_rslora=True),
        case("kasa", "mlp", "lin0", "lin1", kasa_config={"beta": 0.01, "gamma": 0.02}, r=2, lora_dropout=0.5),
        case("kasa_patterns", "blocks", "q_proj", "up", kasa_config={}, r=2, rank_pattern={"up": 3}, use_rslora=True),
        case("velora", "mlp", "lin0", "lin1", velora_config={"num_groups": 4, "scale": 0.5}),
        case("velora_once", "blocks", "q_proj", velora_config={"num_groups": 3, "init_type": "batch_average_once"}),
        case("monteclora", "mlp", "lin0", "lin1", r=3, monteclora_config=MONTE, lora_dropout=0.5),
        case("monteclora_blocks", "blocks", "q_proj", r=2, monteclora_config=MONTE | {"num_samples": 2}),
        case("mica", "mlp", "lin0", "out", init_lora_weights="mica", r=2, lora_dropout=0.5),
        case("mica_embedding", "embedding", "emb", "lin", init_lora_weights="mica", r=2),
        case("mica_hf_conv1d", "gpt2", "c_attn", init_lora_weights="mica", fan_in_fan_out=True, use_rslora=True),
        case("lora_bias", "mlp", "lin0", "out", lora_bias=True, lora_alpha=9),
        case("lora_bias_conv2d", "conv2d", "conv0", lora_bias=True),
        case("tokens", "blocks", "q_proj", trainable_token_indices=[7, 2, 12]),
        case("tokens_by_name", "blocks", "q_proj", trainable_token_indices={"embed_tokens": [3], "v_proj": [1, 0]}),
        case("parameters", "experts", "gate", target_parameters=["pool.second", "first"], r=2),
        case("parameters_alone", "experts", target_parameters=["gate.weight", "pool.second"], target_modules=[], r=3),
    ]
}


def other(method: str, note: str, net: str, *targets: str, merges: bool = True, **config: Any) -> Case:
    return Case(f"{method.lower()}_{note}", net, {"target_modules": list(targets)} | config, merges, method)


METHOD_CASES = {
    c.name: c
    for c in [
        other("IA3", "linear", "mlp", "lin0", "lin1", "out", feedforward_modules=["lin1"]),
        other("IA3", "conv2d", "conv2d", "conv0", "lin", feedforward_modules=["lin"]),
        other("IA3", "conv2d_inputs", "conv2d", "conv0", feedforward_modules=["conv0"]),
        other("IA3", "conv3d", "conv3d", "conv0", feedforward_modules=[]),
        other("IA3", "hf_conv1d", "gpt2", "c_attn", "c_proj", feedforward_modules=["c_proj"], fan_in_fan_out=True),
        other("LoHa", "linear", "mlp", "lin0", "out", r=2, alpha=3, rank_pattern={"out": 3}),
        other("LoHa", "conv1d", "conv1d", "conv0", "lin", r=2),
        other("LoHa", "conv2d", "conv2d", "conv0", r=2),
        other("LoKr", "linear", "mlp", "lin0", "lin1", "out", r=2, alpha=3),
        other("LoKr", "linear_both", "mlp", "lin0", "lin1", r=1, decompose_both=True, decompose_factor=4),
        other("LoKr", "conv1d", "conv1d", "conv0", "lin", r=1),
        other("LoKr", "conv2d", "conv2d", "conv0", r=4, init_weights="lycoris"),
        other("LoKr", "conv2d_effective", "conv2d", "conv0", r=1, use_effective_conv2d=True),
        other("Hira", "linear", "mlp", "lin0", "lin1", r=3),
        other("Hira", "embedding", "embedding", "emb", "lin", r=2),
        other("Hira", "conv1d", "conv1d", "conv0", r=2),
        other("Hira", "conv2d", "conv2d", "conv0", r=2),
        other("Hira", "conv3d", "conv3d", "conv0", r=2),
        other("Hira", "hf_conv1d", "gpt2", "c_attn", r=2, fan_in_fan_out=True),
        other("OFT", "linear", "mlp", "lin0", "lin1", oft_block_size=2, bias="oft_only"),
        other("OFT", "linear_exact", "mlp", "lin1", r=2, oft_block_size=0, use_cayley_neumann=False),
        other("OFT", "linear_shared", "mlp", "lin1", oft_block_size=4, block_share=True, num_cayley_neumann_terms=3),
        other("OFT", "conv2d", "conv2d_square", "conv1", oft_block_size=2),
        other("OFT", "embedding", "embedding", "emb", oft_block_size=2),
        other("OFT", "constrained", "mlp", "lin0", "lin1", oft_block_size=2, coft=True, eps=0.3),
        other("HRA", "linear", "mlp", "lin0", "lin1", r=4),
        other("HRA", "linear_gs", "mlp", "lin0", r=3, apply_GS=True, init_weights=False),
        other("HRA", "conv2d", "conv2d_square", "conv0", "conv1", r=2),
        other("Miss", "linear", "mlp", "lin0", "lin1", r=4),
        other("Miss", "linear_mini", "mlp", "lin0", r=2, mini_r=2, init_weights="mini"),
        other("Miss", "linear_bat", "mlp", "lin0", r=2, init_weights="bat"),
        other("Gralora", "linear", "mlp", "lin0", "lin1", r=4, alpha=5),
        other("Gralora", "hybrid", "mlp", "lin0", r=4, gralora_k=2, hybrid_r=2, alpha=5),
        other("LNTuning", "norms", "blocks", "ln", "norm"),
        other("LNTuning", "linear", "mlp", "lin0", "lin1", "norm"),
        other("LNTuning", "conv1d", "conv1d", "conv0", "conv1"),
        other("LNTuning", "embedding", "embedding", "emb"),
        other("TrainableTokens", "embedding", "embedding", "emb", token_indices=[7, 2, 5]),
        other("TrainableTokens", "head", "mlp", "lin1", token_indices=[1, 6]),
        other("Vera", "linear", "mlp", "lin0", "lin1", "out", r=5, bias="vera_only"),
        other("Vera", "seed", "blocks", "q_proj", "up", r=3, projection_prng_key=2**33 + 5, save_projection=False),
        other("Vera", "hf_conv1d", "gpt2", "c_attn", "c_proj", r=3, fan_in_fan_out=True),
        other("Pvera", "linear", "mlp", "lin0", "lin1", "out", r=5, bias="pvera_only"),
        other("Pvera", "seed", "blocks", "q_proj", "up", r=3, projection_prng_key=2**33 + 5, save_projection=False),
        other("Pvera", "hf_conv1d", "gpt2", "c_attn", "c_proj", r=3, fan_in_fan_out=True, generator_seed=3),
        other("UniLora", "linear", "mlp", "lin0", "lin1", "out", r=3, theta_d_length=17),
        other("UniLora", "blocks", "blocks", "q_proj", "up", r=2, theta_d_length=500, proj_seed=2**40),
        other("UniLora", "kept", "mlp", "lin1", "lin0", r=2, theta_d_length=9, save_indices=True),
        other("UniLora", "hf_conv1d", "gpt2", "c_attn", r=2, theta_d_length=12, fan_in_fan_out=True, bias="all"),
        other("TinyLora", "linear", "mlp", "lin0", "lin1", "out", u=5),
        other("TinyLora", "tied", "blocks", "q_proj", "up", u=7, r=3, weight_tying=0.5, projection_seed=2**33),
        other("TinyLora", "drawn", "mlp", "lin1", "lin0", r=9, u=9, save_projection=False, bias="tinylora_only"),
        other("TinyLora", "embedding", "embedding", "emb", "lin", u=4),
        other("TinyLora", "hf_conv1d", "gpt2", "c_attn", u=6, weight_tying=1.0, fan_in_fan_out=True),
        other("Lily", "blocks", "blocks", "q_proj", "up", merges=False, r=3, stride_A=2, num_B=3, scaling=2.0),
        other("Lily", "linear", "mlp", "lin0", "lin1", merges=False, r=2),
        other("AdaLora", "linear", "mlp", "lin0", "lin1", init_r=4, target_r=2, total_step=10, lora_alpha=5),
        other("AdaLora", "conv2d", "conv2d", "conv0", "lin", init_r=3, target_r=2, total_step=10),
        other("AdaLora", "hf_conv1d", "gpt2", "c_attn", init_r=3, total_step=5, fan_in_fan_out=True),
        other("Shira", "linear", "mlp", "lin0", "lin1", r=2, random_seed=3),
        other("Road", "one", "mlp", "lin0", "lin1", group_size=4),
        other("Road", "two", "mlp", "lin0", "lin1", group_size=2, variant="road_2"),
        other("Road", "four", "mlp", "lin0", "lin1", group_size=8, variant="road_4"),
        other("C3A", "linear", "mlp", "lin0", "lin1", block_size=2),
        other("C3A", "bias", "blocks", "up", "down", block_size=2, bias="c3a_only", block_size_pattern={"up": 1}),
        other("VBLoRA", "linear", "mlp", "lin0", "lin1", r=3, num_vectors=7, vector_length=2),
        other(
            "VBLoRA", "hf_conv1d", "gpt2", "c_attn", r=2, num_vectors=5, vector_length=2, topk=3, fan_in_fan_out=True
        ),
        other(
            "FourierFT", "linear", "mlp", "lin0", "lin1", n_frequency=11, scaling=9.0, n_frequency_pattern={"lin1": 5}
        ),
        other("FourierFT", "hf_conv1d", "gpt2", "c_attn", n_frequency=7, random_loc_seed=3, fan_in_fan_out=True),
        other("WaveFT", "linear", "mlp", "lin0", "lin1", n_frequency=9, scaling=2.0, n_frequency_pattern={"lin1": 5}),
        other("WaveFT", "shares", "mlp", "lin0", "out", n_frequency=6, scaling=2.0, proportional_parameters=True),
        other(
            "WaveFT",
            "long",
            "blocks",
            "up",
            "q_proj",
            n_frequency=9,
            scaling=1.0,
            wavelet_family="db3",
            bias="waveft_only",
        ),
        other(
            "WaveFT",
            "plain",
            "gpt2",
            "c_attn",
            n_frequency=7,
            scaling=1.0,
            random_loc_seed=3,
            use_idwt=False,
            fan_in_fan_out=True,
        ),
        other("OSF", "linear", "mlp", "lin0", "lin1", "out", rank_pattern={"lin1": 3, "out": 0.4}),
        other("OSF", "rank", "blocks", "up", "q_proj", effective_rank=3),
        other("RandLora", "linear", "mlp", "lin0", "lin1", "out", r=3, randlora_alpha=5),
        other("RandLora", "sparse", "mlp", "lin0", "out", r=4, randlora_alpha=5, sparse=True, save_projection=False),
        other("RandLora", "hf_conv1d", "gpt2", "c_attn", r=2, randlora_alpha=3, very_sparse=True, fan_in_fan_out=True),
        other("BOFT", "linear", "mlp", "lin0", "lin1", boft_block_size=2),
        other("BOFT", "linear_number", "mlp", "lin1", boft_block_size=0, boft_block_num=2, bias="boft_only"),
        other("BOFT", "conv2d", "conv2d_square", "conv0", "conv1", boft_block_size=0, boft_block_num=1),
        other("Poly", "splits", "blocks", "q_proj", "up", merges=False, r=3, n_skills=3, n_splits=2),
        other("Beft", "linear", "mlp", "lin0", "out"),
        other("Peanut", "linear", "mlp", "lin0", "lin1", r=3, scaling=0.7),
        other("Peanut", "deep", "mlp", "lin0", "out", r=2, depth=2, act_fn="gelu_new"),
        other("Deft", "linear", "mlp", "lin0", "lin1", r=3, alpha=5, bias="deft_only"),
        other("Deft", "qr", "mlp", "lin0", "out", r=4, decomposition_method="qr", deft_dropout=0.5),
        other("Deft", "para", "blocks", "up", "q_proj", r=2, para=True),
        other("Deft", "hf_conv1d", "gpt2", "c_attn", r=3, fan_in_fan_out=True),
        other("Glora", "linear", "mlp", "lin0", "out", r=3),
        other("Glora", "vector", "mlp", "lin0", "lin1", config_A_B="vector", config_C="vector", config_D_E="vector"),
        other("Glora", "constant", "blocks", "q_proj", "v_proj", config_A_B="constant", config_C="none"),
        other("Glora", "none", "mlp", "lin0", config_A_B="none", config_C="lora", config_D_E="none", r=2),
        other("Supertuning", "linear", "mlp", "lin0", "lin1", sparsity=0.8),
        other("Supertuning", "smallest", "mlp", "out", sparsity=0.6, select_top=False, r=2, lora_alpha=3),
        other("Supertuning", "supra", "blocks", "up", "q_proj", sparsity=0.7, r=2, lora_dropout=0.5),
        other("Delora", "linear", "mlp", "lin0", "lin1", r=3, lambda_pattern={"lin1": 2}),
    ]
}

ALL_CASES = CASES | METHOD_CASES

_SHAPES = {
    "mlp": (3, 6),
    "dense_activation": (3, 6),
    "mint_linear": (3, 6),
    "conv1d": (2, 4, 9),
    "conv2d": (2, 4, 7, 5),
    "conv2d_same": (2, 3, 6, 5),
    "conv2d_square": (2, 3, 6, 5),
    "conv3d": (2, 4, 3, 5, 4),
    "gpt2": (2, 3, 6),
    "experts": (3, 6),
}
_TOKENS = {"embedding": 11, "blocks": 13}


@dataclass
class Record:
    """What a library makes of a net with an adapter.

    Attributes:
        output, loss: of a fixed batch, in evaluation mode.
        gradients: of everything that trains, by key in HF's files.
        trainable, total: parameter counts.
        text: what `print_trainable_parameters` prints.
        merged_output: of the net with the adapter merged; None where that cannot be.
        merged: the base model's weights after `merge_and_unload`.
    """

    output: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]
    trainable: int
    total: int
    text: str
    merged_output: np.ndarray | None = None
    merged: dict[str, np.ndarray] | None = None


def compare(ours: Record, theirs: Record) -> None:
    """Assert that two records are equal."""
    same("output", ours.output, theirs.output)
    same("loss", ours.loss, theirs.loss)
    same_dicts("gradient", ours.gradients, theirs.gradients)
    assert (ours.trainable, ours.total, ours.text) == (theirs.trainable, theirs.total, theirs.text)
    if theirs.merged_output is not None:
        same("output", ours.merged_output, theirs.merged_output, "merged output")
        same("output", ours.merged_output, ours.output, "merged output against unmerged")
        same_dicts("weight", ours.merged, theirs.merged, "merged")


def make_input(net: str, rng: np.random.Generator) -> np.ndarray:
    """A batch for the net of that name."""
    if net in _TOKENS:
        return rng.integers(0, _TOKENS[net], (2, 5)).astype(np.int32)
    return rng.normal(size=_SHAPES[net]).astype(np.float32)


def make_weight(key: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A value for a parameter: neither small nor saturating, and a scale near one for the norms."""
    value = 0.4 * rng.normal(size=shape)
    return (1 + value if re.search(r"(norm|ln)\b.*weight$", key) else value).astype(np.float32)


def file_key(name: str, adapter: str = "default") -> str:
    """A parameter's key in HF's adapter files, from its name in a model that holds the adapter."""
    parts = [part for part in name.split(".") if part not in (adapter, "modules_to_save")]
    # HF holds this vector in a module of its own, and leaves that out of the file.
    return ".".join(parts).replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
