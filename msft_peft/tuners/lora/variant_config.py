"""Settings of LoRA's variants: HF's fields, defaults and checks."""

from dataclasses import dataclass, field

from msft_peft.config import check_finite, check_positive, check_types
from msft_peft.errors import ConfigError


@dataclass
class KasaConfig:
    """Settings of `kasa_config`, see `kasa.KasaPatch`.

    Args:
        beta: weight of the squared singular values in `LoraModel.penalty`.
        gamma: weight of the factors' distance from orthonormal ones.

    Raises:
        ConfigError: one of them is negative.

    Source: Wang et al. 2024, arXiv:2412.06071, eq. 9 to 11.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            value = getattr(self, name)
            check_finite(name, value)
            if value < 0:
                raise ConfigError(f"`{name}` must be non-negative, got {value}.")


@dataclass
class BdLoraConfig:
    """Settings of `use_bdlora`, see `bdlora.BdLoraPatch`.

    Args:
        target_modules_bd_a: layers whose A is block-diagonal: those whose path has one of these strings in it.
        target_modules_bd_b: layers whose B is.
        nblocks: number of blocks: the number of devices over which the weights are to be split in serving.
        match_strict: refuse target layers that have neither; otherwise they have plain LoRA.

    Raises:
        ConfigError: a string in both lists, or `nblocks` is no positive integer.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        check_positive("nblocks", self.nblocks)
        for name in ("target_modules_bd_a", "target_modules_bd_b"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"`{name}` must be a list of strings, got the string {getattr(self, name)!r}")
        check_types(self)
        both = sorted(set(self.target_modules_bd_a or []) & set(self.target_modules_bd_b or []))
        if both:
            raise ConfigError(
                f"Found overlapping modules in target_modules_bd lists: {both} are in target_modules_bd_a and in "
                "target_modules_bd_b, but only one factor of a layer can be block-diagonal."
            )


@dataclass
class VeloraConfig:
    """Settings of `velora_config`, see `velora.VeloraPatch`.

    Args:
        num_groups: parts into which a layer's inputs are divided, each of which is kept as one number.
        scale: factor of A's gradient.
        init_type: what a part is projected on: "batch_average", the mean part of each batch; "batch_average_once",
            that of the first one; "random", a random direction.

    Raises:
        ConfigError: a number that is not positive, or another `init_type`.
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        known = ("batch_average_once", "batch_average", "random")
        for name in ("num_groups", "scale"):
            value = getattr(self, name)
            check_finite(name, value)
            if value <= 0:
                raise ConfigError(f"`{name}` should be positive, got {value}.")
        check_positive("num_groups", self.num_groups)
        if self.init_type not in known:
            raise ConfigError(f"Unsupported `init_type` {self.init_type!r}. Supported values are {known}.")
        check_types(self)


@dataclass
class MontecloraConfig:
    """Settings of `monteclora_config`, see `monteclora.MontecloraPatch`.

    Args:
        num_samples: random samples in the mean that stands for A while the model trains.
        use_entropy: add the squared weights of that mean to `LoraModel.penalty`, so that no sample takes it all.
        dirichlet_prior: concentration of the prior of these weights.
        sample_scaler: how far the samples are from A.
        kl_loss_weight: weight of the divergences from the priors in the penalty.
        buffer_size: HF's: how many samples it draws ahead. They are drawn where they are needed here.

    Raises:
        ConfigError: a number that is not positive where it must be.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            value = getattr(self, name)
            check_finite(name, value)
            if value <= 0:
                raise ConfigError(f"`{name}` must be greater than 0, got {value}.")
        check_positive("num_samples", self.num_samples)
        check_finite("sample_scaler", self.sample_scaler)
        check_finite("kl_loss_weight", self.kl_loss_weight)
        check_types(self)


@dataclass
class ArrowConfig:
    """Settings of `arrow_config`, see `create_arrow_model`.

    Args:
        top_k: how many adapters serve a token.
        router_temperature: divides the tokens' affinities to them before the softmax.
        use_gks: take the mean of the general adapters out of each (general knowledge subtraction).
        rng_seed: HF's, for the start of its power iteration; the vectors are exact here.

    Attributes:
        task_adapter_names: the adapters among which the tokens are divided; None for all that are neither the router
            nor general.
        gks_adapter_names: the general adapters.

    Raises:
        ConfigError: `top_k` or `router_temperature` is not positive.

    Source: Ostapenko et al. 2024, arXiv:2405.11157; GenKnowSub: arXiv:2505.10939.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        check_positive("top_k", self.top_k)
        check_finite("router_temperature", self.router_temperature)
        if self.router_temperature <= 0:
            raise ConfigError(f"`router_temperature` must be greater than 0, got {self.router_temperature}.")
        check_types(self)
