"""What prompt methods put before the input: virtual tokens, or keys and values. Nothing in the model is wrapped."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, cast

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Initializer, Normal, initializer

from msft_peft.backend.arrays import FLOAT_DTYPES, as_float32, to_numpy, write
from msft_peft.backend.tree import Named, named_parameters
from msft_peft.config import PromptLearningConfig, TaskType
from msft_peft.core.wrapper import Wrapper, outer_cells
from msft_peft.errors import ConfigError
from msft_peft.hosts import describe, input_table, signature
from msft_peft.registry import method_of

EMBEDDINGS = "inputs_embeds"
PREFIX_STATES = "past_key_values"

# A config's field -> what the configs of models call it.
_SIZES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


class Table(nn.Cell):
    """A matrix with a row for each virtual token, under the name `weight`."""

    def __init__(self, values: Tensor, requires_grad: bool = True) -> None:
        super().__init__()
        self.weight = Parameter(values, name="weight", requires_grad=requires_grad)

    def construct(self, indices: Tensor) -> Tensor:
        return ops.gather(self.weight, indices, 0)


class VirtualTokens(nn.Cell):
    """What one adapter of a prompt method puts before the input. It knows no adapter names and does no bookkeeping.

    A method writes `setup`, and `virtual` if its rows are made of other weights than `embedding.weight`.

    Args:
        config: the method's config, all sizes known.
        word_embeddings: the base model's table of tokens, if the method starts from it.
        undrawn: draw no random weights, since they are about to be loaded; until then they are NaN.

    Attributes:
        argument: the base model's argument that takes the rows: `inputs_embeds`, or `past_key_values` where a row
            holds the keys and values of all layers.
        own_loss: it computes the loss itself, in `adjusted`; the base model sees no labels.
        in_decoder: of an encoder-decoder, the second half of the rows stands before the decoder's input.
        frozen: paths of its parameters that are never trained.
        tokens: how many rows there are.
        reparametrised: the rows are made of other weights, of which HF's files know nothing.
    """

    argument: ClassVar[str] = EMBEDDINGS
    frozen: ClassVar[tuple[str, ...]] = ()
    own_loss: ClassVar[bool] = False
    in_decoder: ClassVar[bool] = False
    reparametrised = False

    def __init__(self, config: Any, word_embeddings: nn.Cell | None = None, undrawn: bool = False) -> None:
        super().__init__()
        self.config, self.undrawn = config, undrawn
        self.tokens = config.num_virtual_tokens * (config.num_transformer_submodules or 1)
        self.setup(config, word_embeddings)
        if undrawn:
            for p in self.get_parameters():
                # Not a number, so that weights which were never loaded cannot go unnoticed.
                p.set_data(Tensor(np.full(p.shape, np.nan, np.float32)))

    def setup(self, config: Any, word_embeddings: nn.Cell | None) -> None:
        """Declare the weights."""
        raise NotImplementedError

    def virtual(self) -> Tensor:
        """The rows, (tokens, width): what HF's files hold as `prompt_embeddings`."""
        return self.embedding.weight

    def construct(self, indices: Tensor | None = None, task_ids: Tensor | None = None) -> Tensor:
        """The rows at `indices`, an integer tensor; all of them in order by default.

        Taking all in order is no lookup, so that its gradient scatters nothing.
        """
        rows = self.virtual()
        return rows if indices is None else ops.gather(rows, indices, 0)

    def adjusted(self, outputs: Any, named: Mapping[str, Any]) -> Any:
        """The base model's outputs as the method wants them, given all arguments of the call."""
        return outputs

    def table(self, width: int, values: np.ndarray | Initializer | None = None) -> Table:
        """A new `Table` of this many rows: the given values, or drawn from N(0, 1)."""
        if isinstance(values, np.ndarray):
            return Table(Tensor(as_float32(values)))
        return Table(initializer(values or Normal(1.0), (self.tokens, width), ms.float32))

    # --- files --------------------------------------------------------------------------------------------------

    def stored(self) -> dict[str, Named]:
        """What HF's files hold, by their keys; `local` is the path below this Cell."""
        if not self.reparametrised:
            parts = self.parts()
            keys = parts if len(parts) > 1 else ["prompt_embeddings"]
            return {key: Named(key, path, p, tuple(p.shape)) for key, (path, p) in zip(keys, parts.items())}
        rows = Parameter(Tensor(self.rows()), name="prompt_embeddings", requires_grad=False)
        return {"prompt_embeddings": Named("prompt_embeddings", "prompt_embeddings", rows, tuple(rows.shape))}

    def own(self) -> dict[str, Named]:
        """All its parameters, by their keys in the file that training goes on from."""
        return {f"prompt_encoder.{named.key}": named for named in named_parameters(self)}

    def parts(self) -> dict[str, Parameter]:
        """The weights that are the rows, one after another, by their paths; where no others make them."""
        return {"embedding.weight": self.embedding.weight}

    def load_prompt_embeddings(self, prompt_embeddings: Tensor | np.ndarray) -> None:
        """Write the rows, (tokens, width), in place: compiled code sees it.

        Raises:
            ConfigError: they have another shape, or other weights make the rows.
        """
        if self.reparametrised:
            raise ConfigError("Virtual tokens that a network makes cannot be written: load its own weights.")
        rows, parts = as_float32(to_numpy(prompt_embeddings)), list(self.parts().values())
        wanted = (self.tokens, parts[0].shape[1])
        if rows.shape != wanted:
            raise ConfigError(f"Invalid `prompt_embeddings` shape. Expected {wanted}, got {rows.shape}.")
        for p in parts:
            write(p, rows[: p.shape[0]])
            rows = rows[p.shape[0] :]

    def rows(self) -> np.ndarray:
        """The rows as they are now, nothing dropped at random."""
        with self.resting():
            return as_float32(to_numpy(self.virtual())).copy()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Inside the block it is not in training mode."""
        training = self.training
        self.set_train(False)
        try:
            yield
        finally:
            self.set_train(training)

    def set_requires_grad(self, requires_grad: bool) -> None:
        """Freeze or unfreeze the weights that are trained at all."""
        for path, p in self.parameters_and_names():
            p.requires_grad = requires_grad and path not in self.frozen


class Prompts:
    """The prompt encoders of one base model, and which of them is in use.

    A plain object, which both the base model and the `PeftModel` around it hold. Compiled code takes all of it for
    constants, but for the parameters in `encoders`.

    Attributes:
        encoders: adapter name -> its `VirtualTokens`; stands in the tree as `PeftModel.prompt_encoder`.
        active: the adapter in use; empty if there is none.
        enabled: False while all adapters are switched off.
        acting: whether anything is put before the input.
        argument: see `VirtualTokens`; the same for all adapters of a model.
        table: the layer that turns tokens into vectors; None if it is not needed.
        arguments: names of the base model's arguments, in order.
        ids: the one of them that holds tokens.
        dtype: what keys and values must have.
    """

    def __init__(self, model: nn.Cell, argument: str) -> None:
        self.encoders = nn.CellDict()
        self.active, self.enabled, self.acting = "", True, False
        self.argument = argument
        self.table: nn.Cell | None = None
        self.arguments = tuple(signature(model).parameters)
        self.ids = "input_ids" if "input_ids" in self.arguments else next(iter(self.arguments), "input_ids")
        self.measure(model)

    def measure(self, model: nn.Cell) -> None:
        """Note the base model's dtype."""
        self.dtype = next((p.dtype for p in model.get_parameters() if p.dtype in FLOAT_DTYPES), ms.float32)

    def held(self) -> Mapping[str, VirtualTokens]:
        """The encoders by adapter name."""
        return cast("Mapping[str, VirtualTokens]", self.encoders._cells)

    def put(self, name: str, encoder: VirtualTokens) -> None:
        """Add an encoder, idle; one of the same name is replaced."""
        self.encoders._cells[name] = encoder

    def drop(self, name: str) -> None:
        """Take one out; without effect if it is not there."""
        self.encoders._cells.pop(name, None)
        self.use(other for other in (self.active,) if other != name)

    def use(self, names: Iterable[str]) -> None:
        """Put the one adapter among `names` that is here to use, or none."""
        self.active = next((name for name in names if name in self.held()), "")
        self.acting = self.enabled and bool(self.active)

    def enable(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        self.enabled = enabled
        self.acting = enabled and bool(self.active)

    def set_requires_grad(self, names: Iterable[str], requires_grad: bool) -> None:
        """Freeze or unfreeze some of the encoders."""
        for name in names:
            if name in self.held():
                self.held()[name].set_requires_grad(requires_grad)


def prompts_of(model: nn.Cell) -> Prompts | None:
    """The prompt encoders of a base model; None if it has none."""
    return model.__dict__.get("peft_prompts")


def word_embeddings(model: nn.Cell) -> nn.Cell | None:
    """The layer that turns tokens into vectors: the one that the model names, or the only one that it has."""
    named = input_table(model)
    if named is not None:
        return named
    found = [cell for cell in outer_cells(model).values() if _is_table(cell)]
    return found[0] if len(found) == 1 else None


def _is_table(cell: nn.Cell) -> bool:
    site = describe(_unwrapped(cell), "")
    return site is not None and site.kind == "embedding"


def _unwrapped(cell: nn.Cell) -> nn.Cell:
    return cell.base() if isinstance(cell, Wrapper) else cell


def vocabulary(table: nn.Cell) -> np.ndarray:
    """The vectors of all tokens, (vocabulary, dim), in the table's dtype: a view, where MindSpore gives one."""
    inner = _unwrapped(table)
    site = describe(inner, "")
    return to_numpy(inner.weight if site is None else site.weight)


def completed(config: PromptLearningConfig, model: nn.Cell) -> None:
    """Write the sizes that the config leaves open, as the model has them.

    Raises:
        ConfigError: a size is needed, and neither the config nor the model's tells it; or the model cannot take what
            the method makes. The field, or what to add to the model, is named.
    """
    method = method_of(config)
    kind = cast("type[VirtualTokens]", method.prompt)
    _check_takes(model, kind.argument, method.name)
    if config.num_virtual_tokens is None:
        raise ConfigError(f"{type(config).__name__} needs num_virtual_tokens: how many to put before the input.")
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    for field, names in _SIZES.items():
        if getattr(config, field) is None:
            setattr(config, field, _setting(model, names))
    if kind.argument == PREFIX_STATES:
        _count_key_heads(config, model)
        needed = tuple(_SIZES)
    else:
        _measure_tokens(config, model, method.name)
        needed = ()
    missing = [field for field in needed if getattr(config, field) is None]
    if missing:
        raise ConfigError(
            f"Please specify `{missing[0]}` in `peft_config`: {method.name} needs {', '.join(needed)}, and "
            f"{type(model).__name__}.config tells it under none of the names {_SIZES[missing[0]]}."
        )
    if getattr(config, "encoder_hidden_size", "none") is None:
        config.encoder_hidden_size = config.token_dim  # type: ignore[attr-defined]


def _count_key_heads(config: PromptLearningConfig, model: nn.Cell) -> None:
    """Where query heads share keys and values, a prefix has a key for each of the shared ones: token_dim = D · K."""
    heads, width = (_setting(model, _SIZES[field]) for field in ("num_attention_heads", "token_dim"))
    head_dim = _setting(model, ("head_dim", "d_kv")) or (width // heads if width and heads else None)
    keys = _setting(model, ("num_key_value_heads",)) or heads
    if head_dim and keys:
        config.num_attention_heads, config.token_dim = keys, head_dim * keys
    elif config.token_dim and config.num_attention_heads and config.token_dim % config.num_attention_heads:
        raise ConfigError(
            f"token_dim={config.token_dim} is no multiple of num_attention_heads={config.num_attention_heads}."
        )


def _measure_tokens(config: PromptLearningConfig, model: nn.Cell, name: str) -> None:
    table = word_embeddings(model)
    if table is None:
        raise ConfigError(
            f"{name} puts virtual tokens before the embeddings of the input, but which layer of "
            f"{type(model).__name__} makes those is not clear. Give it a method "
            "get_input_embeddings() that returns that layer."
        )
    width = vocabulary(table).shape[1]
    known = _setting(model, _SIZES["token_dim"])
    if config.token_dim not in (None, known, width):
        raise ConfigError(f"token_dim={config.token_dim}, but the model's tokens are vectors of length {width}.")
    config.token_dim = width


def _check_takes(model: nn.Cell, argument: str, name: str) -> None:
    parameters = signature(model).parameters.values()
    if any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters):
        return
    what = {
        EMBEDDINGS: "inputs_embeds=None, the embeddings (B, T, H) that stand in for those of input_ids",
        PREFIX_STATES: "past_key_values=None, a tuple with a pair (key, value) for each layer, each (B, heads, "
        "virtual tokens, head_dim), which its attention puts before its own keys and values",
    }[argument]
    raise ConfigError(
        f"{name} cannot be used with {type(model).__name__}: its construct does not take {argument}. Add an argument "
        f"{what}."
    )


def _setting(model: nn.Cell, names: Iterable[str]) -> Any:
    """What the model's config, or the text part of it, says under the first of these names that it has."""
    config = getattr(model, "config", None)
    for place in (config, _read(config, "text_config")):
        for name in names:
            if _read(place, name) is not None:
                return _read(place, name)
    return None


def _read(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
