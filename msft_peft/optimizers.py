"""Optimizers that know what LoRA's A and B are: LoRA+ and LoRA-FA, over MindSpore's own."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.experimental import optim

from msft_peft.backend.arrays import to_numpy
from msft_peft.backend.graphs import drop_compiled
from msft_peft.core.layer import TunerLayer
from msft_peft.errors import ConfigError, PeftWarning

_FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


def create_loraplus_optimizer(
    model: nn.Cell, optimizer_cls: type, *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Any:
    """LoRA+: an optimizer of your choice in which B learns `loraplus_lr_ratio` times as fast as A.

    | group | learning rate | weight decay |
    |---|---|---|
    | A, and all else of two dimensions or more | lr | yes |
    | both factors of embeddings | loraplus_lr_embedding | yes |
    | B | lr · ratio | yes |
    | biases and all else of one dimension | lr · ratio | no |

    Only what is trainable now is in it, so call this after `set_adapter` and the like. The gradients that it takes are
    those of `optimizer.parameters`, in this order; for the optimizers of `mindspore.nn` it is that of
    `model.trainable_params()`.

    Args:
        model: the model with the adapters.
        optimizer_cls: a class of `mindspore.nn` (`nn.AdamWeightDecay`) or `mindspore.experimental.optim` (`AdamW`).
        lr: A's learning rate, a number.
        loraplus_lr_ratio: B's learning rate in units of lr; above 1, and the larger the harder the task.
        kwargs: passed on to the class; beside them `loraplus_lr_embedding` (1e-6 by default) and
            `loraplus_weight_decay` (that of `weight_decay`, or else 0).

    Raises:
        ConfigError: a learning rate or a ratio that is no positive number, or nothing is trainable.
        TypeError: no optimizer class, or an argument that it does not take.

    Source: Hayou et al. 2024, arXiv:2402.12354.
    Differs: HF ignores `weight_decay`; here it counts unless `loraplus_weight_decay` is given.
    """
    is_nn = isinstance(optimizer_cls, type) and issubclass(optimizer_cls, nn.Optimizer)
    if not is_nn and not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, optim.Optimizer)):
        raise TypeError(
            "optimizer_cls must be an optimizer class of mindspore.nn or mindspore.experimental.optim, got "
            f"{optimizer_cls!r}"
        )
    lr_embedding = kwargs.pop("loraplus_lr_embedding", 1e-6)
    for name, value in (("lr", lr), ("loraplus_lr_ratio", loraplus_lr_ratio), ("loraplus_lr_embedding", lr_embedding)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"`{name}` must be a positive number, since rates are computed from it; got {value!r}")
    plain_decay = kwargs.pop("weight_decay", 0.0)
    decay = kwargs.pop("loraplus_weight_decay", plain_decay)
    params = model.trainable_params()
    if not params:
        raise ConfigError(
            "Nothing in this model is trainable. Make an adapter trainable first: model.set_adapter(...)."
        )
    rates = {
        "A": lr,
        "embedding": lr_embedding,
        "B": lr * loraplus_lr_ratio,
        "one-dimensional": lr * loraplus_lr_ratio,
    }
    groups: list[dict[str, Any]] = []
    for group, rate in rates.items():
        members = [p for p in params if _group_of(p) == group]
        if members:
            no_decay = group == "one-dimensional"
            groups.append({"params": members, "lr": rate, "weight_decay": 0.0 if no_decay else decay})
    if is_nn:
        return optimizer_cls([*groups, {"order_params": params}], learning_rate=lr, **kwargs)
    return optimizer_cls(groups, lr=lr, **kwargs)


def _group_of(p: Parameter) -> str:
    if "lora_embedding" in p.name:
        return "embedding"
    if len(p.shape) == 1:
        return "one-dimensional"
    return "B" if "lora_B" in p.name else "A"


def create_lorafa_optimizer(
    model: nn.Cell, r: int, lora_alpha: float, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> "LoraFAOptimizer":
    """LoRA-FA: freezes A, and returns an optimizer for B and for all else that is trainable.

    With A frozen neither its gradient nor its input's copy nor its optimizer state is needed.

    Args:
        model: the model with the adapters, one of them trainable; its A is frozen from here on.
        r, lora_alpha, use_rslora: HF's. Each layer's own scaling is used, in HF too; a warning says so where these
            belie the adapter's config.
        lr: the learning rate: a number, or what else `nn.Adam` takes.
        weight_decay: decoupled, of everything.

    Raises:
        ConfigError: no LoRA adapter is trainable, or an A is zero, so that nothing could be learned with it frozen (a
            fresh embedding's is; target other layers), or the adapter has `target_parameters`.

    Source: Zhang et al. 2023, arXiv:2308.03303; the projection: Wang et al. 2024, arXiv:2407.18242.
    """
    pairs: dict[int, Pair] = {}
    frozen: list[Parameter] = []
    for _, layer in model.cells_and_names():
        for name, patch in layer.held().items() if isinstance(layer, TunerLayer) else ():
            for names in _FACTORS:
                if set(names) <= set(patch.keys) and getattr(patch, names[1]).requires_grad:
                    a, b = (getattr(patch, attribute) for attribute in names)
                    if layer.site.kind == "parameter":
                        raise ConfigError(
                            f"Adapter {name!r} has target_parameters ({layer.site.path}.{layer.site.weight_name}), "
                            "whose factors are stacks of matrices. LoRA-FA projects single ones: take another one."
                        )
                    if not to_numpy(a).any():
                        raise ConfigError(
                            f"The A of adapter {name!r} at {layer.site.path} is zero: frozen, it would let B learn "
                            "nothing. That is so of fresh embedding layers: target other layers for LoRA-FA."
                        )
                    pairs[id(b)] = Pair(a, float(patch.scaling), layer.site.groups)
                    frozen.append(a)
    if not pairs:
        raise ConfigError("No LoRA adapter of this model is trainable. Make one so first: model.set_adapter(...).")
    _say_what_counts(model, r, lora_alpha, use_rslora)
    for a in frozen:
        a.requires_grad = False
    drop_compiled()
    params = model.trainable_params()
    return LoraFAOptimizer(params, [pairs.get(id(p)) for p in params], lr, weight_decay)


def _say_what_counts(model: nn.Cell, r: int, lora_alpha: float, use_rslora: bool | None) -> None:
    given = {"r": r, "lora_alpha": lora_alpha} | ({} if use_rslora is None else {"use_rslora": use_rslora})
    for name in getattr(model, "active_adapters", ()):
        config = model.peft_config[name]
        own = {key: getattr(config, key, None) for key in given}
        if own != given:
            warnings.warn(
                f"create_lorafa_optimizer was given {given}, but adapter {name!r} has {own}: each layer's own scaling "
                "is used.",
                PeftWarning,
                stacklevel=3,
            )


class Pair(NamedTuple):
    """What the gradient of a B is projected by: the A that goes with it, their scaling, and a convolution's groups."""

    a: Parameter
    scaling: float
    groups: int


class LoraFAOptimizer(nn.Optimizer):
    """Adam with bias correction and decoupled weight decay, on the gradients of B projected to those of the product.

    G_B ← G_B·(A·Aᵀ + 1e-8·I)⁻¹ / s², so that a step of B changes s·B·A as nearly as it can in the way in which a step
    of the whole weight would; then p ← p - lr·√(1 - β₂ᵗ)/(1 - β₁ᵗ)·m/(√v + ε) and p ← p - lr·λ·p, with β₁ = 0.9,
    β₂ = 0.999 and ε = 1e-6.

    Args:
        params: what to train.
        pairs: for each of them, what its gradient is projected by; None for what is no B.
        lr: the learning rate: a number, or a schedule as `nn.Adam` takes it.
        weight_decay: λ.

    Differs: HF rounds the projected gradient to bfloat16; fails on convolutions.
    """

    def __init__(
        self, params: Sequence[Parameter], pairs: Sequence[Pair | None], lr: Any, weight_decay: float = 0.0
    ) -> None:
        super().__init__(lr, list(params))
        self.moment1 = self.parameters.clone(prefix="moment1", init="zeros")
        self.moment2 = self.parameters.clone(prefix="moment2", init="zeros")
        self.beta1_power = Parameter(Tensor(1.0, ms.float32), name="beta1_power", requires_grad=False)
        self.beta2_power = Parameter(Tensor(1.0, ms.float32), name="beta2_power", requires_grad=False)
        # The kernel under nn.Adam, since that class cannot be extended: in PyNative its compiled `construct` would
        # take the subclass's in its place, and apply all of it twice.
        self.adam = ops.Adam()
        self.projections = tuple(None if pair is None else Projection(pair) for pair in pairs)
        self.decoupled_decay = weight_decay

    def construct(self, gradients: tuple[Tensor, ...]) -> bool:
        lr = self.get_lr()
        ops.assign_add(self.global_step, Tensor([1], ms.int32))
        power1 = ops.assign(self.beta1_power, self.beta1_power * 0.9)
        power2 = ops.assign(self.beta2_power, self.beta2_power * 0.999)
        for i, p in enumerate(self.parameters):
            gradient = gradients[i]
            project = self.projections[i]
            if project is not None:
                gradient = project(gradient)
            self.adam(p, self.moment1[i], self.moment2[i], power1, power2, lr, 0.9, 0.999, 1e-6, gradient)
            if self.decoupled_decay > 0:
                ops.assign(p, ops.cast(p * (1 - lr * self.decoupled_decay), p.dtype))
        return True


class Projection(nn.Cell):
    """B's gradient (out, r / groups, 1...) times (A·Aᵀ + 1e-8·I)⁻¹ / s², group by group."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        # Within a tuple A is no parameter of this Cell: it belongs to the model.
        self.held = (pair.a,)
        self.groups, self.square = pair.groups, pair.scaling**2
        self.ridge = Tensor(1e-8 * np.eye(pair.a.shape[0] // pair.groups), ms.float32)

    def construct(self, gradient: Tensor) -> Tensor:
        a = ops.cast(self.held[0], ms.float32)
        a = ops.reshape(a, (self.groups, a.shape[0] // self.groups, -1))
        g = ops.cast(ops.reshape(gradient, (self.groups, gradient.shape[0] // self.groups, -1)), ms.float32)
        gram = ops.bmm(a, ops.transpose(a, (0, 2, 1))) + self.ridge
        projected = ops.bmm(g, ops.inverse(gram)) / self.square
        return ops.cast(ops.reshape(projected, gradient.shape), gradient.dtype)
