"""The forward of models with a prompt before the input: one for all methods and tasks."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from mindspore import Tensor, nn, ops

from msft_peft.backend.graphs import drop_compiled
from msft_peft.core import switch
from msft_peft.core.checkpointing import is_checkpointing, set_checkpointing
from msft_peft.core.prompt import EMBEDDINGS, PREFIX_STATES, Prompts, VirtualTokens, prompts_of
from msft_peft.core.wrapper import wrappers
from msft_peft.errors import PeftWarning

_IGNORED = -100
# Arguments of a call that some prompts take and base models do not know.
_FOR_PROMPTS = ("task_ids", "input_type_mask")


class Prompted(nn.Cell):
    """A base model, and what its prompt adapters put before the input.

    Attributes:
        base_model: the base model itself, or for other methods the `Tuner` around it.
        prompts: the encoders; None for other methods.
    """

    # What a task says of its inputs: whether labels stand for tokens of the input, whether types of tokens are usual,
    # and whether the base model has a decoder beside its encoder.
    _pads_labels: ClassVar[bool] = False
    _extends_types: ClassVar[bool] = False
    _has_decoder: ClassVar[bool] = False

    prompts: Prompts | None = None

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        if self.prompts is None:
            return self.base_model(*args, **kwargs)
        named = {}
        for i in range(len(args)):
            if args[i] is not None:
                named[self.prompts.arguments[i]] = args[i]
        for key in kwargs:
            if kwargs[key] is not None:
                named[key] = kwargs[key]
        if not self.prompts.acting:
            return self.base_model(**_without(named, _FOR_PROMPTS))
        encoder = self.prompt_encoder[self.prompts.active]
        rows = encoder(None, named.get("task_ids"))
        given = _without(named, (*_FOR_PROMPTS, "labels") if encoder.own_loss else _FOR_PROMPTS)
        if self.prompts.argument == PREFIX_STATES:
            given = self._after_prefix(given, rows)
        else:
            given = self._after_tokens(given, rows, encoder.in_decoder)
        return encoder.adjusted(self.base_model(**given), named)

    def _after_tokens(self, named: dict[str, Any], rows: Tensor, in_decoder: bool) -> dict[str, Any]:
        """The base model's arguments with the virtual tokens `rows`, (n, d) or (B, n, d), before its input.

        Of twice as many, the second half stands before the decoder's input, if `in_decoder`; otherwise it is unused.
        """
        x = self._embedded(named)
        front = rows
        if self._has_decoder:
            config = self.prompt_encoder[self.prompts.active].config  # type: ignore[union-attr]
            front = rows[..., : config.num_virtual_tokens, :]
            if in_decoder and config.num_transformer_submodules > 1:
                named = self._behind(named, rows[..., config.num_virtual_tokens :, :])
        n, b = front.shape[-2], x.shape[0]
        # Each key is written once: gradients through a dict whose entries are replaced go wrong in compiled code.
        given = {EMBEDDINGS: ops.concat((_for_batch(front, b, x), x), 1)}
        for key in named:
            if key == "attention_mask":
                given[key] = _lengthened(named[key], b, n, 1)
            elif key == "token_type_ids":
                if self._extends_types:
                    given[key] = _lengthened(named[key], b, n, 0)
            elif key == "labels" and self._pads_labels:
                given[key] = _lengthened(named[key], b, n, _IGNORED)
            elif key not in (self.prompts.ids, EMBEDDINGS, "position_ids"):  # type: ignore[union-attr]
                given[key] = named[key]
        return given

    def _behind(self, named: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        """The arguments with the virtual tokens `rows` before the decoder's input."""
        if "decoder_inputs_embeds" in named:
            x = named["decoder_inputs_embeds"]
        elif "decoder_input_ids" in named:
            x = self.prompts.table(named["decoder_input_ids"])  # type: ignore[union-attr, misc]
        else:
            ids = self.base_model.prepare_decoder_input_ids_from_labels(named["labels"])
            x = self.prompts.table(ids)  # type: ignore[union-attr, misc]
        n, b = rows.shape[-2], x.shape[0]
        given = {"decoder_inputs_embeds": ops.concat((_for_batch(rows, b, x), x), 1)}
        for key in named:
            if key == "decoder_attention_mask":
                given[key] = _lengthened(named[key], b, n, 1)
            elif key == "labels":
                given[key] = _lengthened(named[key], b, n, _IGNORED)
            elif key not in ("decoder_input_ids", "decoder_inputs_embeds"):
                given[key] = named[key]
        return given

    def _after_prefix(self, named: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        """The base model's arguments with the prefix `rows`, (n, 2·L·K·D)."""
        if PREFIX_STATES in named:
            raise ValueError("a model with a prefix makes its own past_key_values: leave them out")
        b, n = self._first(named).shape[0], rows.shape[0]
        given: dict[str, Any] = {PREFIX_STATES: self._states(rows, b)}
        mask = "decoder_attention_mask" if self._has_decoder else "attention_mask"
        for key in named:
            if key == mask:
                given[key] = _lengthened(named[key], b, n, 1)
            elif key == "position_ids":
                given[key] = named[key] + n
            elif key != "token_type_ids" or self._extends_types:
                given[key] = named[key]
        return given

    def _states(self, rows: Tensor, batch: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """(n, 2·L·K·D) -> for each layer a key and a value, each (B, K, n, D).

        HF lays them out for both attentions of a decoder; of layer l the one that sees them has the pair 2·l mod L.
        """
        config = self.prompt_encoder[self.prompts.active].config  # type: ignore[union-attr]
        layers, heads = config.num_layers, config.num_attention_heads
        n = rows.shape[0]
        parts = ops.reshape(ops.cast(rows, self.prompts.dtype), (n, 2 * layers, heads, -1))  # type: ignore[union-attr]
        parts = ops.transpose(parts, (1, 2, 0, 3))  # (2L, K, n, D)
        shape = (batch, heads, n, parts.shape[-1])
        states: tuple[Any, ...] = ()
        for layer in range(layers):
            pair = layer * config.num_transformer_submodules % layers
            key, value = parts[2 * pair], parts[2 * pair + 1]
            states = (*states, (ops.broadcast_to(key, shape), ops.broadcast_to(value, shape)))
        return states

    def _embedded(self, named: dict[str, Any]) -> Tensor:
        """The embeddings of the input, (B, T, d)."""
        if EMBEDDINGS in named:
            return named[EMBEDDINGS]
        return self.prompts.table(self._first(named))  # type: ignore[union-attr, misc]

    def _first(self, named: dict[str, Any]) -> Tensor:
        """What tells the size of the batch."""
        if self.prompts.ids in named:  # type: ignore[union-attr]
            return named[self.prompts.ids]  # type: ignore[union-attr]
        if EMBEDDINGS in named:
            return named[EMBEDDINGS]
        raise ValueError("the model was given neither input_ids nor inputs_embeds")

    # --- outside of compiled code -------------------------------------------------------------------------------

    def _stand_before(self, model: nn.Cell) -> None:
        """Take a base model whose prompt encoders are attached."""
        self.base_model = model
        self.prompts = prompts_of(model)
        self.prompt_encoder = self.prompts.encoders  # type: ignore[union-attr]

    def _say_what_is_ignored(self, given: Mapping[str, Any]) -> None:
        prompts = self.prompts
        if prompts is None or not prompts.acting:
            return
        if given.get("position_ids") is not None and prompts.argument == EMBEDDINGS:
            warnings.warn(
                "Position ids are not supported for parameter efficient tuning. Ignoring position ids.",
                PeftWarning,
                stacklevel=3,
            )
        if given.get("token_type_ids") is not None and not self._extends_types:
            warnings.warn(
                "Token type ids are not supported for parameter efficient tuning. Ignoring token type ids",
                PeftWarning,
                stacklevel=3,
            )

    def _generate_prompted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The base model's `generate` after the active prompt."""
        prompts, generate = self.prompts, self.base_model.generate
        assert prompts is not None
        task_ids = kwargs.get("task_ids")
        named = {key: value for key, value in kwargs.items() if key not in _FOR_PROMPTS}
        bound = inspect.signature(generate).bind_partial(*args)
        named |= {key: value for key, value in bound.arguments.items() if value is not None}
        if not prompts.acting:
            return generate(**named)
        shown = {key: Tensor(value) for key, value in named.items() if key in (prompts.ids, EMBEDDINGS)}
        mask = named.get("attention_mask")
        batch = self._first(shown).shape[0]
        with self._encoder(prompts.active).resting():
            prompt = self.get_prompt(batch, task_ids)
        if prompts.argument == PREFIX_STATES:
            return generate(**named | {PREFIX_STATES: prompt})
        x, rows = self._embedded(shown), prompt
        if self._has_decoder:
            rows = rows[:, : self._encoder(prompts.active).config.num_virtual_tokens]
        n = rows.shape[1]
        named[EMBEDDINGS] = ops.concat((ops.cast(rows, x.dtype), x), 1)
        if mask is not None:
            named["attention_mask"] = _lengthened(Tensor(mask), batch, n, 1)
        if named.get("max_length") is not None and not self._has_decoder:
            named["max_length"] += n  # it counts the tokens that the caller sees
        if "position_ids" in inspect.signature(generate).parameters:
            named["position_ids"] = self._positions(named.get("attention_mask"), batch, n + x.shape[1])
        return generate(**named)

    def _positions(self, mask: Tensor | None, batch: int, length: int) -> Tensor:
        """Positions (B, T) as a forward pass, training for instance, counts them by itself: over padding, too."""
        slots = ops.range(0, length, 1)
        count = getattr(self.base_model.base_model, "positions", None)  # a model may count in a way of its own
        return ops.broadcast_to(slots if count is None else count(slots, length, mask), (batch, length))

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Any:
        """What the active adapter puts before a batch.

        Args:
            batch_size: number of rows, B.
            task_ids: (B,), integers: the task of each row, for multitask prompt tuning.

        Returns:
            The virtual tokens (B, n, d), or for prefix tuning a pair (key, value) for each layer, (B, K, n, D) each.

        Raises:
            ValueError: the method puts nothing before the input, or `task_ids` are missing.
        """
        if self.prompts is None or not self.prompts.active:
            raise ValueError("get_prompt: no adapter that puts virtual tokens before the input is active.")
        rows = self._encoder(self.prompts.active)(None, task_ids)
        if self.prompts.argument == PREFIX_STATES:
            return self._states(rows, batch_size)
        return ops.broadcast_to(rows, (batch_size, *rows.shape[-2:]))

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The virtual tokens of an adapter as files hold them, (n, d), or (n, 2·L·K·D) for a prefix.

        Raises:
            ValueError: the adapter is not there, or has none.
        """
        return Tensor(self._encoder(adapter_name).rows())

    def _encoder(self, name: str) -> VirtualTokens:
        if self.prompts is None or name not in self.prompts.held():
            raise ValueError(f"{name!r} is no adapter with virtual tokens in this model.")
        return self.prompts.held()[name]

    @property
    def word_embeddings(self) -> nn.Cell | None:
        """The layer that turns tokens into vectors; None for other methods."""
        return None if self.prompts is None else self.prompts.table


def _without(named: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    kept = {}
    for key in named:
        if key not in keys:
            kept[key] = named[key]
    return kept


def _for_batch(rows: Tensor, batch: int, x: Tensor) -> Tensor:
    """(n, d) or (B, n, d) -> (B, n, d), in x's dtype."""
    return ops.broadcast_to(ops.cast(rows, x.dtype), (batch, rows.shape[-2], rows.shape[-1]))


def _lengthened(values: Tensor, batch: int, n: int, value: int) -> Tensor:
    """(B, T) -> (B, n + T), with `value` in front."""
    return ops.concat((ops.full((batch, n), value, dtype=values.dtype), values), 1)


class PromptSwitches:
    """What a `Tuner` is to the adapters in a model's layers, for those that stand before its input.

    It is no Cell: in the tree nothing stands between the `PeftModel` and the base model.
    """

    def __init__(self, model: nn.Cell) -> None:
        self.model = model

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        switch.set_adapter(self.model, adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        switch.set_requires_grad(self.model, adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        switch.delete_adapter(self.model, adapter_name)

    @contextlib.contextmanager
    def _disabled(self) -> Iterator[None]:
        """The prompt away and the heads the base model's inside the block; as before after it."""
        prompts = prompts_of(self.model)
        assert prompts is not None
        before = prompts.enabled
        self._enable(prompts, False)
        try:
            yield
        finally:
            self._enable(prompts, before)

    def _enable(self, prompts: Prompts, enabled: bool) -> None:
        prompts.enable(enabled)
        for _, wrapper in wrappers(self.model):
            wrapper.enable_adapters(enabled)
        drop_compiled()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, blocks: str | Sequence[str] | None = None
    ) -> None:
        set_checkpointing(self.model, True, blocks, gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self, blocks: str | Sequence[str] | None = None) -> None:
        set_checkpointing(self.model, False, blocks)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return is_checkpointing(self.model)
