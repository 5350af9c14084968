"""Llama-3.2-3B, whole but for the numbers in it: what HF's benchmark says that each method trains and saves there.

The figures are those of HF peft's `method_comparison` (MetaMathQA): exact numbers of trained parameters, and sizes of
`adapter_model.safetensors` in MiB, to a tenth; but for those of AdaLoRA, RandLoRA and Lily, which are our own, and
say why.
"""

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore.nn.utils import no_init_parameters

import msft_peft
from msft_peft import get_peft_model
from msft_peft.models import LlamaConfig, LlamaForCausalLM

TASK = {"task_type": "CAUSAL_LM"}
QV = {"target_modules": ["q_proj", "v_proj"]}
MLP = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
ALL = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", *MLP["target_modules"]]}
BLOCKS = {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["gate_proj", "up_proj"], "nblocks": 2}
# Run, config, its settings, trained parameters, MiB.
PUBLISHED: list[tuple[str, str, dict[str, Any], int, float]] = [
    ("lora-rank32", "LoraConfig", QV | {"r": 32}, 9_175_040, 35.0),
    ("lora-rank64-rslora", "LoraConfig", QV | {"r": 64, "use_rslora": True}, 18_350_080, 70.0),
    ("lora-rank10-target-mlp", "LoraConfig", MLP | {"r": 10}, 9_461_760, 36.1),
    ("lora-rank32-dora", "LoraConfig", QV | {"r": 32, "use_dora": True}, 9_289_728, 35.5),
    ("lora-rank14-target-mlp-bdlora", "LoraConfig", MLP | {"r": 14, "use_bdlora": BLOCKS}, 8_429_568, 32.2),
    ("hira-rank32", "HiraConfig", QV | {"r": 32}, 9_175_040, 35.0),
    ("shira", "ShiraConfig", QV | {"r": 32, "random_seed": 42}, 9_175_040, 105.0),
    ("miss-default", "MissConfig", QV | {"r": 64}, 7_340_032, 28.0),
    ("miss-bat", "MissConfig", QV | {"r": 64, "init_weights": "bat"}, 7_340_032, 28.0),
    ("miss-mini", "MissConfig", QV | {"r": 64, "mini_r": 64, "init_weights": "mini"}, 229_376, 0.9),
    ("gralora-rank32", "GraloraConfig", QV | {"r": 32}, 9_175_040, 35.0),
    ("oft-rank32", "OFTConfig", QV | {"r": 32, "oft_block_size": 0}, 8_171_520, 31.2),
    ("c3a-default", "C3AConfig", QV | {"block_size": 64}, 5_505_024, 21.0),
    ("delora-rank32", "DeloraConfig", QV | {"r": 32}, 9_175_096, 35.7),
    ("lokr-rank32-factor4", "LoKrConfig", QV | {"r": 32, "decompose_factor": 4}, 2_294_656, 8.8),
    ("loha-rank32", "LoHaConfig", QV | {"r": 32}, 18_350_080, 70.0),
    ("ia3-default", "IA3Config", {}, 286_720, 1.1),
    ("ia3-all-attn", "IA3Config", ALL | {"feedforward_modules": MLP["target_modules"]}, 630_784, 2.4),
    ("road", "RoadConfig", QV | {"variant": "road_2"}, 229_376, 0.9),
    ("boft-default", "BOFTConfig", QV, 802_816, 3.1),
    ("vera-default", "VeraConfig", QV, 129_024, 6.5),
    ("pvera-default", "PveraConfig", QV, 143_360, 9.6),
    ("pvera-rank64", "PveraConfig", QV | {"r": 64}, 121_856, 2.7),
    ("unilora-default", "UniLoraConfig", QV, 256, 0.0),
    # HF's files of Lily, 796.4 and 1372.4 MiB, hold each factor at all of the layers that share it.
    ("lily-rank140-mlp", "LilyConfig", MLP | {"r": 140, "stride_A": 14, "scaling": 8.0}, 9_485_280, 36.2),
    ("lily-rank896", "LilyConfig", QV | {"r": 896, "stride_A": 14, "scaling": 2.0}, 18_450_432, 70.4),
    ("vblora-default", "VBLoRAConfig", QV, 1_212_416, 4.6),
    ("beft-target-v_proj", "BeftConfig", {"target_modules": ["v_proj"]}, 28_672, 0.1),
    ("peanut-rank32", "PeanutConfig", QV | {"scaling": 2.0}, 7_340_032, 28.0),
    ("peanut-rank1", "PeanutConfig", QV | {"r": 1, "scaling": 32.0}, 229_376, 0.9),
    ("deft-rank32", "DeftConfig", QV | {"r": 32}, 9_175_040, 35.0),
    ("deft-rank32-para", "DeftConfig", QV | {"r": 32, "para": True}, 3_670_016, 14.0),
    ("glora-default", "GloraConfig", QV, 4_587_520, 18.3),
    (
        "glora-vector-paths",
        "GloraConfig",
        QV | {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        229_376,
        1.7,
    ),
    ("fourierft-default", "FourierFTConfig", QV, 56_000, 0.2),
    ("fourierft-n_frequency-5000", "FourierFTConfig", QV | {"n_frequency": 5000}, 280_000, 1.1),
    ("waveft-n_frequency-5000", "WaveFTConfig", QV | {"n_frequency": 5000}, 280_000, 1.1),
    ("ln_tuning-default", "LNTuningConfig", {}, 175_104, 0.3),
    ("trainable_tokens-sos+eos", "TrainableTokensConfig", {"token_indices": [128000, 128001]}, 6_144, 0.0),
    ("prompt_tuning-default", "PromptTuningConfig", {"num_virtual_tokens": 200}, 614_400, 2.3),
    ("prefixtuning", "PrefixTuningConfig", {"num_virtual_tokens": 200}, 11_468_800, 43.8),
    (
        "ptuning-default",
        "PromptEncoderConfig",
        {"num_virtual_tokens": 20, "encoder_hidden_size": 3072},
        28_382_208,
        0.2,
    ),
    # HF's file of adaption prompts, 16.4 MiB, is in the base model's bfloat16.
    ("adaptionprompt", "AdaptionPromptConfig", {"adapter_len": 100, "adapter_layers": 28}, 8_601_628, 32.8),
    # HF's file of AdaLoRA, 33.5 MiB, is that of a trained adapter, whose smallest singular values are gone.
    ("adalora-rank32", "AdaLoraConfig", QV | {"init_r": 64, "target_r": 32, "total_step": 5000}, 18_353_664, 70.0),
    # HF's file of RandLoRA, 2108.8 MiB, holds the random matrices at each of the 56 layers again.
    ("randlora-default", "RandLoraConfig", QV, 9_289_728, 71.8),
]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """The model in half precision; all weights are views of one array of zeros, which takes no memory."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with no_init_parameters():
        model = LlamaForCausalLM(config)
    parameters = list(model.get_parameters())
    zeros = np.zeros(max(p.size for p in parameters), np.float16)
    for p in parameters:
        p.set_dtype(ms.float16)
        p.set_data(ms.from_numpy(zeros[: p.size].reshape(p.shape)))
    assert sum(p.size for p in parameters) == 3_212_749_824
    return model


@pytest.mark.parametrize(
    ("config", "settings", "trained", "size"), [p[1:] for p in PUBLISHED], ids=[p[0] for p in PUBLISHED]
)
def test_figures_are_hfs(
    llama: LlamaForCausalLM, tmp_path: Path, config: str, settings: dict[str, Any], trained: int, size: float
):
    model = get_peft_model(llama, getattr(msft_peft, config)(**TASK, **settings))
    try:
        assert model.get_nb_trainable_parameters()[0] == trained
        model.save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        # The header, some 100 bytes a tensor, counts too.
        assert file.stat().st_size / 2**20 == pytest.approx(size, abs=0.06)
    finally:
        model.delete_adapter("default") if model.peft_config["default"].is_prompt_learning else model.unload()


def test_the_figures_of_one_block_are_hfs(llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """osf-rank128: 194,535,936 numbers in 28 blocks, and 371.1 MiB in bfloat16; what an SVD finds is not asked for."""

    def no_svd(w: np.ndarray, full_matrices: bool) -> tuple[np.ndarray, ...]:
        (out, inputs), rank = w.shape, min(w.shape)
        return np.zeros((out, rank), np.float32), np.zeros(rank, np.float32), np.zeros((rank, inputs), np.float32)

    monkeypatch.setattr(np.linalg, "svd", no_svd)
    ranks = {"effective_rank": 3072 - 128, "rank_pattern": {"k_proj|v_proj": 1024 - 128}}
    model = get_peft_model(llama, msft_peft.OSFConfig(**TASK, **ranks, layers_to_transform=[0], **ALL))
    try:
        assert 28 * model.get_nb_trainable_parameters()[0] == 194_535_936
        model.save_pretrained(tmp_path)
        size = (tmp_path / "adapter_model.safetensors").stat().st_size / 2**20
        assert 28 * size == pytest.approx(2 * 371.1, abs=0.2)
    finally:
        model.unload()
