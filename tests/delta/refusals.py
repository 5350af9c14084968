"""Every exception that MindPet's documents promise: a name of its package, arguments, and the kind of error."""

import mindspore as ms
from mindspore import Tensor, ops

DENSE = {"in_channels": 4, "out_channels": 6}
LORA = DENSE | {"lora_rank": 2, "lora_alpha": 4}
LOW = DENSE | {"reduction_factor": 2}
LAYER = {"hidden_size": 6, "reduction_factor": 2}
PREFIX = {"prefix_token_num": 4, "batch_size": 2, "num_heads": 2, "hidden_dim": 6, "embed_dim": 5}
ENCODER = {"pre_seq_len": 3, "num_layers": 2, "num_heads": 2, "kv_channels": 4, "prefix_projection": True}
ENCODER |= {"projection_dim": 5, "dropout_prob": 0.1}


def tensor(*shape: int) -> Tensor:
    return ops.ones(shape, ms.float32)


def rows(name: str, base: dict, kind: type, **bad: list) -> list[tuple[str, dict, type]]:
    return [(name, base | {field: value}, kind) for field, values in bad.items() for value in values]


NO_INT, NO_SIZE = ["4", 4.0, True, None], [0, -1]
NO_DTYPE = [ms.int32, ms.float64, "float32", None]

REFUSALS = [
    *rows("LoRADense", LORA, TypeError, in_channels=NO_INT, out_channels=NO_INT, lora_rank=NO_INT),
    *rows(
        "LoRADense", LORA, TypeError, lora_alpha=["4", True, None], has_bias=[1, "True"], lora_dropout=[0, "0", True]
    ),
    *rows("LoRADense", LORA, TypeError, activation=[3, ms], param_init_type=NO_DTYPE, compute_dtype=NO_DTYPE),
    *rows("LoRADense", LORA, ValueError, in_channels=NO_SIZE, out_channels=NO_SIZE, lora_rank=NO_SIZE, lora_alpha=[0]),
    *rows(
        "LoRADense", LORA, ValueError, lora_dropout=[-0.1, 1.0], lora_a_init=[tensor(4), tensor(3, 4), tensor(2, 5)]
    ),
    *rows("LoRADense", LORA, ValueError, lora_b_init=[tensor(6), tensor(5, 2), tensor(6, 1)]),
    *rows("LoRADense", LORA, ValueError, weight_init=[tensor(6), tensor(5, 4), tensor(6, 3)]),
    *rows("AdapterDense", DENSE, TypeError, in_channels=NO_INT, out_channels=NO_INT, bottleneck_size=NO_INT),
    *rows("AdapterDense", DENSE, TypeError, has_bias=[1], activation=[3], param_init_type=NO_DTYPE),
    *rows("AdapterDense", DENSE, TypeError, compute_dtype=NO_DTYPE, non_linearity=[3, None], weight_init=[None, ms]),
    *rows("AdapterDense", DENSE, TypeError, bias_init=[None, ms]),
    *rows("AdapterDense", DENSE, ValueError, weight_init=["xx", tensor(6), tensor(5, 4), tensor(6, 3)]),
    *rows("AdapterDense", DENSE, ValueError, bias_init=["xx", tensor(6, 1), tensor(5)], non_linearity=["xx"]),
    *rows("AdapterDense", DENSE, ValueError, in_channels=NO_SIZE, out_channels=NO_SIZE, bottleneck_size=NO_SIZE),
    *rows("AdapterDense", DENSE, KeyError, activation=["xx"]),
    *rows("AdapterLayer", {"hidden_size": 6}, TypeError, hidden_size=NO_INT, bottleneck_size=NO_INT),
    *rows("AdapterLayer", {"hidden_size": 6}, TypeError, non_linearity=[3], param_init_type=NO_DTYPE),
    *rows("AdapterLayer", {"hidden_size": 6}, TypeError, compute_dtype=NO_DTYPE),
    *rows("AdapterLayer", {"hidden_size": 6}, ValueError, hidden_size=NO_SIZE, bottleneck_size=NO_SIZE),
    *rows("AdapterLayer", {"hidden_size": 6}, ValueError, non_linearity=["xx"]),
    *rows("LowRankAdapterDense", LOW, TypeError, in_channels=NO_INT, out_channels=NO_INT, reduction_factor=NO_INT),
    *rows("LowRankAdapterDense", LOW, TypeError, low_rank_size=NO_INT, has_bias=[1], activation=[3]),
    *rows("LowRankAdapterDense", LOW, TypeError, weight_init=[None], bias_init=[None], low_rank_w_init=[3, None]),
    *rows("LowRankAdapterDense", LOW, TypeError, non_linearity=[3], param_init_type=NO_DTYPE, compute_dtype=NO_DTYPE),
    *rows("LowRankAdapterDense", LOW, ValueError, weight_init=["xx", tensor(6), tensor(5, 4), tensor(6, 3)]),
    *rows("LowRankAdapterDense", LOW, ValueError, bias_init=["xx", tensor(6, 1), tensor(5)], low_rank_w_init=["xx"]),
    *rows("LowRankAdapterDense", LOW, ValueError, in_channels=NO_SIZE, out_channels=NO_SIZE, low_rank_size=NO_SIZE),
    *rows("LowRankAdapterDense", LOW, ValueError, reduction_factor=[*NO_SIZE, 7], non_linearity=["xx"]),
    *rows("LowRankAdapterDense", LOW, KeyError, activation=["xx"]),
    *rows("LowRankAdapterLayer", LAYER, TypeError, hidden_size=NO_INT, reduction_factor=NO_INT, low_rank_size=NO_INT),
    *rows("LowRankAdapterLayer", LAYER, TypeError, low_rank_w_init=[3], non_linearity=[3], param_init_type=NO_DTYPE),
    *rows("LowRankAdapterLayer", LAYER, TypeError, compute_dtype=NO_DTYPE),
    *rows("LowRankAdapterLayer", LAYER, ValueError, reduction_factor=[*NO_SIZE, 7], low_rank_size=NO_SIZE),
    *rows("LowRankAdapterLayer", LAYER, ValueError, low_rank_w_init=["xx"], non_linearity=["xx"]),
    *rows("PrefixLayer", PREFIX, TypeError, prefix_token_num=[*NO_INT, *NO_SIZE], batch_size=[*NO_INT, *NO_SIZE]),
    *rows("PrefixLayer", PREFIX, TypeError, num_heads=[*NO_INT, *NO_SIZE], hidden_dim=[*NO_INT, *NO_SIZE]),
    *rows("PrefixLayer", PREFIX, TypeError, embed_dim=[*NO_INT, *NO_SIZE], mid_dim=[*NO_INT, *NO_SIZE]),
    *rows("PrefixLayer", PREFIX, ValueError, prefix_token_num=[3], dropout_rate=[-0.1, 1.0]),
    *rows("PrefixEncoder", ENCODER, TypeError, pre_seq_len=[*NO_INT, *NO_SIZE], num_layers=[*NO_INT, *NO_SIZE]),
    *rows("PrefixEncoder", ENCODER, TypeError, num_heads=[*NO_INT, *NO_SIZE], kv_channels=[*NO_INT, *NO_SIZE]),
    *rows("PrefixEncoder", ENCODER, TypeError, projection_dim=[*NO_INT, *NO_SIZE]),
    *rows("PrefixEncoder", ENCODER, ValueError, dropout_prob=[-0.1, 1.0]),
]
