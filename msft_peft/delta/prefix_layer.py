"""PrefixLayer: a key and a value prefix for one attention layer."""

import sys

from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import constexpr

from msft_peft.delta.checks import DeltaValueError, check_dropout, check_size
from msft_peft.errors import PeftError


class PrefixLayer(nn.Cell):
    """(key, value) = the halves of dropout(tanh(E·W₁ᵀ + b₁)·W₂ᵀ + b₂): what attention sees before its own keys.

    Weights:
        mindpet_delta_prefixtuning_wte.embedding_table (prefix_token_num, embed_dim): E.
        mindpet_delta_prefixtuning_control_trans.0: W₁ (mid_dim, embed_dim), b₁; .2: W₂ (2·hidden_dim, mid_dim), b₂.

    Call it in `construct`, each time: `key, value = self.prefix()`. MindPet's `past_key_reparam` and
    `past_value_reparam` give the same, one by one.

    Args:
        prefix_token_num: length of the prefix, a multiple of batch_size.
        batch_size: rows of a batch; the model reshapes the prefix to it.
        num_heads: heads of the attention; kept for the model.
        hidden_dim: size of a key.
        embed_dim: size of an embedding.
        mid_dim: width of the MLP.
        dropout_rate: a float in [0, 1), while training.

    Outputs: key (prefix_token_num, hidden_dim), value (prefix_token_num, hidden_dim).

    Raises:
        DeltaTypeError (TypeError): a size is no int, or dropout_rate no float.
        DeltaArgumentError (TypeError and ValueError): a size is not positive.
        DeltaValueError (ValueError): prefix_token_num is no multiple of batch_size, or dropout_rate outside [0, 1).

    Differs: MindPet computes the prefix once, when the layer is made, so that it never learns, and takes the first
    half for the value as well. Its W₂ has hidden_dim rows, since it needs but one half.

    Source: Li & Liang 2021, arXiv:2101.00190.
    """

    def __init__(
        self,
        prefix_token_num: int,
        batch_size: int,
        num_heads: int,
        hidden_dim: int,
        embed_dim: int,
        mid_dim: int = 512,
        dropout_rate: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = {"prefix_token_num": prefix_token_num, "batch_size": batch_size, "num_heads": num_heads}
        check_size(type(self).__name__, **sizes, hidden_dim=hidden_dim, embed_dim=embed_dim, mid_dim=mid_dim)
        check_dropout(type(self).__name__, "dropout_rate", dropout_rate)
        if prefix_token_num % batch_size:
            raise DeltaValueError(
                f"{type(self).__name__}: prefix_token_num={prefix_token_num} must be a multiple of "
                f"batch_size={batch_size}"
            )
        self.prefix_token_num, self.batch_size, self.num_heads = prefix_token_num, batch_size, num_heads
        self.hidden_dim, self.embed_dim, self.mid_dim = hidden_dim, embed_dim, mid_dim
        self.dropout_rate = dropout_rate
        self.dropout = nn.Dropout(p=dropout_rate)
        self.input_tokens = Parameter(
            ops.arange(prefix_token_num).astype("int32"),
            name="mindpet_delta_prefixtuning_input_tokens",
            requires_grad=False,
        )
        self.mindpet_delta_prefixtuning_wte = nn.Embedding(prefix_token_num, embed_dim)
        self.mindpet_delta_prefixtuning_control_trans = nn.SequentialCell(
            nn.Dense(embed_dim, mid_dim), nn.Tanh(), nn.Dense(mid_dim, 2 * hidden_dim)
        )

    def construct(self) -> tuple[Tensor, Tensor]:
        embedded = self.mindpet_delta_prefixtuning_wte(self.input_tokens)
        both = self.dropout(self.mindpet_delta_prefixtuning_control_trans(embedded))
        return both[:, : self.hidden_dim], both[:, self.hidden_dim :]

    @property
    def past_key_reparam(self) -> Tensor:
        """The key prefix as the weights are now; a new Tensor each time, so read it in `construct`.

        Raises:
            PrefixReadTooEarly (RuntimeError): it is read in an `__init__`, where it would stay what it is.
        """
        _check_reader("past_key_reparam")
        return self.construct()[0]

    @property
    def past_value_reparam(self) -> Tensor:
        """The value prefix as the weights are now; see `past_key_reparam`."""
        _check_reader("past_value_reparam")
        return self.construct()[1]


class PrefixReadTooEarly(PeftError, RuntimeError):
    """A prefix was read where it cannot learn."""


# Compiled code runs this once, while it is being compiled, and PyNative each time.
@constexpr(check=False)
def _check_reader(name: str) -> None:
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None and frame.f_back is not None and frame.f_back.f_code.co_name == "__init__":
        raise PrefixReadTooEarly(
            f"PrefixLayer.{name} was read in an __init__: the Tensor would never change, and the prefix never learn "
            "(as in MindPet). Keep the layer itself and read it in construct: key, value = self.prefix()."
        )
