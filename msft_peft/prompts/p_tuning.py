"""P-tuning: virtual tokens made by a small network that is trained with them."""

import warnings
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mindspore import Tensor, nn, ops

from msft_peft.config import PromptLearningConfig, as_member, check_count
from msft_peft.core.prompt import VirtualTokens
from msft_peft.errors import PeftWarning
from msft_peft.registry import Method


class PromptEncoderReparameterizationType(str, Enum):
    """The network that makes the virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning (Liu et al. 2021, arXiv:2103.10385).

    Args:
        encoder_reparameterization_type: "MLP" or "LSTM".
        encoder_hidden_size: the network's width; by default that of a token.
        encoder_num_layers: layers of the LSTM. The MLP always has its two hidden ones.
        encoder_dropout: between the layers of the LSTM.

    Raises:
        ConfigError: an unknown network, or a number that is none.
    """

    peft_type: str = "P_TUNING"
    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = (
        PromptEncoderReparameterizationType.MLP
    )
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encoder_reparameterization_type = as_member(
            "encoder_reparameterization_type",
            PromptEncoderReparameterizationType,
            self.encoder_reparameterization_type,
        )
        check_count("encoder_hidden_size", self.encoder_hidden_size)
        check_count("encoder_num_layers", self.encoder_num_layers)


class PromptEncoder(VirtualTokens):
    """V = MLP(E) or MLP(LSTM(E)), from the trained E (n, d).

    MLP: W₃·ReLU(W₂·ReLU(W₁·e)).  LSTM: W₂·ReLU(W₁·h), with the states h of both directions.

    A config in inference mode has no network: E itself is what stands before the input, and what HF's files hold.

    Args:
        config: a `PromptEncoderConfig`.
    """

    def setup(self, config: Any, word_embeddings: nn.Cell | None) -> None:
        width, hidden = config.token_dim, config.encoder_hidden_size or config.token_dim
        self.embedding = self.table(width)
        self.reparametrised = not config.inference_mode
        self.recurrent = config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM
        if not self.reparametrised:
            return
        if self.recurrent:
            self.lstm_head = nn.LSTM(
                width,
                hidden,
                config.encoder_num_layers,
                batch_first=True,
                bidirectional=True,
                dropout=float(config.encoder_dropout),
            )
            self.mlp_head = nn.SequentialCell(nn.Dense(2 * hidden, 2 * hidden), nn.ReLU(), nn.Dense(2 * hidden, width))
            return
        if config.encoder_num_layers != 2:
            warnings.warn(
                "for MLP, the argument `encoder_num_layers` is ignored. Exactly 2 MLP layers are used.",
                PeftWarning,
                stacklevel=2,
            )
        self.mlp_head = nn.SequentialCell(
            nn.Dense(width, hidden), nn.ReLU(), nn.Dense(hidden, hidden), nn.ReLU(), nn.Dense(hidden, width)
        )

    def virtual(self) -> Tensor:
        rows = self.embedding.weight
        if not self.reparametrised:
            return rows
        if self.recurrent:
            states = self.lstm_head(ops.expand_dims(rows, 0))[0]
            rows = ops.reshape(states, (self.tokens, -1))
        return self.mlp_head(rows)


METHOD = Method(config=PromptEncoderConfig, prompt=PromptEncoder, identity_at_init=False, merges=False)
