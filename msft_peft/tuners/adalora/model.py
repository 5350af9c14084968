"""AdaLoraModel: the penalty in its forward, and the steps of the schedule."""

from collections.abc import Sequence
from typing import Any

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from msft_peft.core.adapter import adapter_in
from msft_peft.core.patch import Reference
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.hosts import original
from msft_peft.tuners.adalora.allocation import RankAllocator
from msft_peft.tuners.adalora.config import AdaLoraConfig


class AdaLoraModel(Tuner):
    """The base model with AdaLoRA adapters in it; what `PeftModel.base_model` is for AdaLoRA.

    Where the base model returns a dict with a "loss", the penalty for A and B that are not orthogonal is added to it:
    `orth_reg_weight` times its mean over the A and B of the active adapter, if that is trained.

    Differs: HF allows one trainable adapter at all; here the active one is trained, and each has a schedule of its
    own. HF fails on a loss when only frozen adapters are there.
    """

    def __init__(self, model: nn.Cell, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self._allocators: dict[str, RankAllocator] = {}
        self._kept: Reference | None = None
        # transformers' outputs are dicts of classes of their own; never compiled.
        self.classed_outputs = original(self.model) is not self.model

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.model(*args, **kwargs)
        if not isinstance(outputs, dict) or "loss" not in outputs or outputs["loss"] is None:
            return outputs
        penalty = self.penalty()
        # Each key is written once: gradients through a dict whose entries are replaced go wrong in compiled code.
        found = {}
        for key in outputs:
            if key == "loss" and penalty is not None:
                found[key] = ops.add(outputs[key], penalty)
            else:
                found[key] = outputs[key]
        return self._classed(outputs, found) if self.classed_outputs else found

    @staticmethod
    def _classed(outputs: Any, found: dict[str, Any]) -> Any:
        return type(outputs)(**found)

    def penalty(self) -> Tensor | None:
        """What the forward adds to a loss, (); None if no adapter is active and trained."""
        total, count = 0.0, 0
        for layer in self.routing.layers:
            if layer.adapting:
                for name in layer.active:
                    patch = layer.adapters[name]
                    if name in layer.trained:
                        total = ops.add(ops.mul(patch.penalty(), patch.orth_reg_weight), total)
                        count += 2
        return ops.div(total, count) if count > 0 else None

    def update_and_allocate(self, global_step: int, gradients: Sequence[Tensor] | None = None) -> None:
        """Note the importance of the active adapter's ranks, and prune them as its schedule says.

        Call it after every optimizer step, with steps counted from 0 as in HF; `AdaLoraCallback` does so in
        `mindspore.train.Model`. Values of E are written in place, so that compiled code sees them without a
        recompilation.

        Args:
            global_step: number of the step.
            gradients: of `trainable_params()`, in their order; by default those that the optimizer made by
                `keeps_gradients` got last. From step `total_step - tfinal` on none are needed.

        Raises:
            ConfigError: gradients are missing, or not one for each parameter, or all zero; or the active adapters are
                merged, several, or none; or `target_r` is above `init_r`.

        Differs: MindSpore keeps no gradients in parameters, so that they must be handed over.
        """
        name = self._active()
        allocator = self._allocator(name)
        config = allocator.config
        assert config.total_step is not None
        end = config.total_step - config.tfinal
        if global_step > end:
            if config.rank_pattern:
                allocator.mask(config.rank_pattern)
            return
        if global_step < end:
            allocator.observe(self._by_parameter(gradients, allocator))
        budget, due = allocator.budget(global_step)
        if due or global_step == end:
            config.rank_pattern = allocator.prune(budget)
        if global_step == end:
            allocator.forget()

    def keeps_gradients(self, optimizer: nn.Cell) -> "KeepsGradients":
        """An optimizer around `optimizer` that keeps the gradients of each step for `update_and_allocate`.

        It costs a copy of the adapter's weights.
        """
        keeping = KeepsGradients(optimizer)
        self._kept = Reference(keeping)
        return keeping

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as in HF: the factors of two adapters do not add up.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} does not support add_weighted_adapter method.")

    def _active(self) -> str:
        names = self.active_adapters
        if len(names) != 1:
            raise ConfigError(f"update_and_allocate needs one active adapter, whose ranks it prunes; active: {names}")
        if any(names[0] in layer.merged_adapters for layer in self.routing.layers):
            raise ConfigError(
                f"{names[0]} is merged into the base weights, where no rank can be pruned: unmerge it first."
            )
        return names[0]

    def _allocator(self, name: str) -> RankAllocator:
        adapter = adapter_in(self.model, name)
        known = self._allocators.get(name)
        # Another adapter may have taken the name since.
        if known is None or known.config is not adapter.config or known.patches != adapter.patches:
            assert isinstance(adapter.config, AdaLoraConfig)
            known = self._allocators[name] = RankAllocator(adapter.config, adapter.patches)
        return known

    def _by_parameter(self, gradients: Sequence[Tensor] | None, allocator: RankAllocator) -> dict[int, Tensor]:
        if gradients is None and self._kept is None:
            raise ConfigError(
                "update_and_allocate needs the gradients of the step: pass those of trainable_params(), or train with "
                "the optimizer that base_model.keeps_gradients(optimizer) gives, or with an AdaLoraCallback."
            )
        if gradients is None:
            assert self._kept is not None
            parameters, gradients = self._kept.cell.parameters, self._kept.cell.gradients()
        else:
            parameters = self.trainable_params()
        if len(parameters) != len(gradients):
            raise ConfigError(f"there are {len(parameters)} trainable parameters, and {len(gradients)} gradients")
        found = {id(p): g for p, g in zip(parameters, gradients, strict=True)}
        missing = [p.name for p in allocator.weights() if id(p) not in found]
        if missing:
            raise ConfigError(f"gradients of the active adapter are not among those given: that of {missing[0]}, say")
        return found


class KeepsGradients(nn.Cell):
    """An optimizer, and copies of the gradients that it was given last.

    Args:
        optimizer: any of `mindspore.nn`, of which `parameters` are known.
    """

    def __init__(self, optimizer: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.parameters = optimizer.parameters
        self.copies = ParameterTuple(
            Parameter(ops.zeros_like(p), name=f"gradient.{p.name}", requires_grad=False) for p in self.parameters
        )

    def construct(self, gradients: tuple[Tensor, ...]) -> Any:
        for i in range(len(self.copies)):
            ops.assign(self.copies[i], gradients[i])
        return self.optimizer(gradients)

    def gradients(self) -> list[Tensor]:
        """Those of the last step, in the order of `parameters`."""
        return list(self.copies)
