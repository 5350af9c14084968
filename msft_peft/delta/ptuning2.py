"""PrefixEncoder: P-Tuning v2's prompts for every layer of a transformer."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from msft_peft.delta.checks import check_bool, check_dropout, check_size


class PrefixEmbedding(nn.Cell):
    """A table (rows, size), drawn with σ = 0.01; one gather, that a strategy can be set on."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.embedding_table = Parameter(initializer("normal", (rows, size)), name="embedding_table")
        self.gather = ops.Gather()

    def construct(self, ids: Tensor) -> Tensor:
        return self.gather(self.embedding_table, ids, 0)


class PrefixEncoder(nn.Cell):
    """For each layer a key and a value prefix, from one table, with an MLP after it if `prefix_projection`.

    Weights, with size = 2·num_layers·num_heads·kv_channels:
        mindpet_delta_ptuning2_embedding.embedding_table (pre_seq_len, size).
        mindpet_delta_ptuning2_dense_in (projection_dim, size), mindpet_delta_ptuning2_dense_out (size,
            projection_dim), with biases: the MLP, tanh between.

    Args:
        pre_seq_len: length of the prefix.
        num_layers: of the transformer.
        num_heads: of its keys and values.
        kv_channels: size of a head's key.
        prefix_projection: whether there is an MLP.
        projection_dim: its width.
        dropout_prob: a float in [0, 1), while training.
        parallel_config: with `data_parallel` and `model_parallel`, for `shard`.
        out_perm: order of (batch, position, layer and kind, head, channel) in the result.

    Inputs: batch_size (int), dtype of the result (float16).
    Outputs: for each layer (2, batch_size, num_heads, pre_seq_len, kv_channels): key and value.

    Raises:
        DeltaTypeError (TypeError): a size is no int, prefix_projection no bool, or dropout_prob no float.
        DeltaArgumentError (TypeError and ValueError): a size is not positive.
        DeltaValueError (ValueError): dropout_prob is outside [0, 1).

    Source: Liu et al. 2021, arXiv:2110.07602.
    """

    def __init__(
        self,
        pre_seq_len: int,
        num_layers: int,
        num_heads: int,
        kv_channels: int,
        prefix_projection: bool,
        projection_dim: int,
        dropout_prob: float,
        parallel_config: Any = None,
        out_perm: tuple[int, ...] = (2, 0, 3, 1, 4),
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_size(owner, pre_seq_len=pre_seq_len, num_layers=num_layers, num_heads=num_heads, kv_channels=kv_channels)
        check_bool(owner, "prefix_projection", prefix_projection)
        if prefix_projection:
            check_size(owner, projection_dim=projection_dim)
        check_dropout(owner, "dropout_prob", dropout_prob)
        self.pre_seq_len, self.num_layers, self.num_heads = pre_seq_len, num_layers, num_heads
        self.kv_channels, self.prefix_projection, self.out_perm = kv_channels, prefix_projection, out_perm
        size = 2 * num_layers * num_heads * kv_channels
        self.dropout = nn.Dropout(p=dropout_prob)
        self.mindpet_delta_ptuning2_prefix = Parameter(
            Tensor(np.arange(pre_seq_len), ms.int64), name="mindpet_delta_ptuning2_prefix", requires_grad=False
        )
        self.mindpet_delta_ptuning2_embedding = PrefixEmbedding(pre_seq_len, size)
        if prefix_projection:
            self.projection_dim = projection_dim
            self.mindpet_delta_ptuning2_dense_in = nn.Dense(size, projection_dim)
            self.mindpet_delta_ptuning2_tanh = nn.Tanh()
            self.mindpet_delta_ptuning2_dense_out = nn.Dense(projection_dim, size)
            # The same once more: in MindPet's checkpoints the MLP has one name or the other, by where the Cell stands.
            self.mindpet_delta_ptuning2_trans = nn.SequentialCell(
                self.mindpet_delta_ptuning2_dense_in,
                self.mindpet_delta_ptuning2_tanh,
                self.mindpet_delta_ptuning2_dense_out,
            )
        self.expand_dims, self.tile, self.cast = ops.ExpandDims(), ops.Tile(), ops.Cast()
        self.reshape, self.transpose = ops.Reshape(), ops.Transpose()
        self.split_layers = ops.Split(0, num_layers)
        if parallel_config is not None:
            self.shard(parallel_config.data_parallel, parallel_config.model_parallel)

    def construct(self, batch_size: int, dtype: Any = ms.float16) -> tuple[Tensor, ...]:
        # (pre_seq_len) -> (batch, pre_seq_len)
        ids = self.tile(self.expand_dims(self.mindpet_delta_ptuning2_prefix, 0), (batch_size, 1))
        prefix = self.mindpet_delta_ptuning2_embedding(ids)
        if self.prefix_projection:
            prefix = self.mindpet_delta_ptuning2_trans(prefix)
        prefix = self.cast(prefix, dtype)
        shape = (batch_size, self.pre_seq_len, 2 * self.num_layers, self.num_heads, self.kv_channels)
        prefix = self.dropout(self.reshape(prefix, shape))
        return self.split_layers(self.transpose(prefix, self.out_perm))

    def shard(self, data_parallel: int, model_parallel: int) -> None:
        """Split batches over `data_parallel` devices, and the MLP's matrices over `model_parallel`."""
        dp, mp = data_parallel, model_parallel
        self.expand_dims.shard(((1,),))
        self.tile.shard(((1, 1),))
        self.mindpet_delta_ptuning2_embedding.gather.shard(((1, 1), (1, 1)))
        if self.prefix_projection:
            for dense in (self.mindpet_delta_ptuning2_dense_in, self.mindpet_delta_ptuning2_dense_out):
                dense.matmul.shard(((dp, 1), (mp, 1)))
                dense.bias_add.shard(((dp, 1), (1,)))
            self.mindpet_delta_ptuning2_tanh.tanh.shard(((dp, 1, 1),))
        self.cast.shard(((dp, 1, 1),))
        self.dropout.dropout.shard(((dp, 1, 1, 1, 1),))
        self.transpose.shard(((dp, 1, 1, 1, 1),))
        self.split_layers.shard(((1, dp, 1, 1, 1),))
