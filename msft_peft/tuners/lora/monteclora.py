"""MonteCLoRA: in training, A is the mean of random samples around it, whose spread and weights are learned."""

import itertools
import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from msft_peft.hosts import Site
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.patch import LoraPatch

_LEAST_VARIANCE, _EPS = 1e-3, 1e-6
_numbers = itertools.count()


class Drawn:
    """What the last training pass drew. No Cell, so that it is not among the model's parameters."""

    def __init__(self, r: int, samples: int) -> None:
        number = next(_numbers)
        # Their means, until something is drawn.
        chi, normal = np.full(r, r, np.float32), np.zeros(samples, np.float32)
        self.chi = Parameter(Tensor(chi), name=f"monteclora_chi_{number}", requires_grad=False)
        self.normal = Parameter(Tensor(normal), name=f"monteclora_normal_{number}", requires_grad=False)

    def __deepcopy__(self, memo: dict) -> "Drawn":
        # Compiled code tells Parameters apart by their names: others for the copy.
        return Drawn(self.chi.shape[0], self.normal.shape[0])


class MontecloraPatch(LoraPatch):
    """LoRA whose A, while it trains, is A + ε·Σₙ wₙ·Zₙᵀ, with Zₙ (in, r) drawn anew in each pass; else plain LoRA.

    Formula: Zₙ has independent normal entries, of variance vᵢ in column i: vᵢ = max(e^(2pᵢ)·χ², 10⁻³), where χ² with r
    degrees of freedom is drawn too (the diagonal of a Wishart matrix). The weights are softmax(m + l·z), z normal, the
    logistic-normal approximation of a Dirichlet distribution of concentration α = e^q: m = log α less its mean,
    l² = (1 - 2/N)/α + Σ(1/α)/N². p, q and A are trained; ε is `sample_scaler`, N `num_samples`.

    Weights: those of LoRA, and, below lora_monteclora_sampler,
        std_prior (r,): p, uniform in [0, 1).
        expert_weights_prior (N,): q, uniform in [0, 1).
        gaussian_var_prior (r, r), expert_weights (N,): diag(v) and w of the last training pass; never trained.

    Source: Sengupta et al. 2024, arXiv:2411.04358.
    Differs: HF draws `buffer_size` passes ahead, each with a whole Wishart matrix and its Cholesky factor, of which
    only the diagonal counts. In its divergence of the Dirichlet distributions one sign is wrong, see `penalty`.
    """

    grows = False

    def setup(self, site: Site, config: LoraConfig) -> None:
        super().setup(site, config)
        self.monte = c = config.monteclora_config
        n, below = c.num_samples, "lora_monteclora_sampler"
        # ms.set_seed sets numpy's seed too.
        p, q = np.random.rand(self.r).astype(np.float32), np.random.rand(n).astype(np.float32)
        self.std_prior = self.weight(f"{below}.std_prior", (self.r,), p, "std_prior")
        self.expert_weights_prior = self.weight(f"{below}.expert_weights_prior", (n,), q, "expert_weights_prior")
        eye, even = np.eye(self.r, dtype=np.float32), np.full(n, 1 / n, np.float32)
        self.gaussian_var_prior = self.weight(
            f"{below}.gaussian_var_prior", eye.shape, eye, "gaussian_var_prior", fixed=True
        )
        self.expert_weights = self.weight(f"{below}.expert_weights", (n,), even, "expert_weights", fixed=True)
        self.drawn = Drawn(self.r, n)

    def hidden(self, x: Tensor) -> Tensor:
        return self.scaled(self.op(x, self.sampled())) if self.training else super().hidden(x)

    def noise(self) -> tuple[Tensor, Tensor, Tensor]:
        """Normal numbers (N, in, r), χ² with r degrees of freedom (r,), and normal numbers (N,)."""
        r, into = self.lora_A.shape
        n = self.expert_weights.shape[0]
        squares = ops.square(ops.standard_normal((r, r)))
        return ops.standard_normal((n, into, r)), ops.reduce_sum(squares, 0), ops.standard_normal((n,))

    def sampled(self) -> Tensor:
        """(r, in): A as this pass has it."""
        z, chi, normal = self.noise()
        v, w = self.variances(chi), self.shares(normal)
        mean = ops.reshape(ops.matmul(ops.reshape(w, (1, -1)), ops.reshape(z, (w.shape[0], -1))), z.shape[1:])
        noise = self.monte.sample_scaler * ops.transpose(ops.mul(mean, ops.sqrt(v)), (1, 0))
        a = ops.add(self.lora_A, ops.cast(noise, self.lora_A.dtype))
        a = ops.depend(a, ops.assign(self.drawn.chi, chi))
        a = ops.depend(a, ops.assign(self.drawn.normal, normal))
        last = ops.cast(ops.stop_gradient(ops.diag(v)), self.gaussian_var_prior.dtype)
        a = ops.depend(a, ops.assign(self.gaussian_var_prior, last))
        last = ops.cast(ops.stop_gradient(w), self.expert_weights.dtype)
        return ops.depend(a, ops.assign(self.expert_weights, last))

    def priors(self) -> tuple[Tensor, Tensor]:
        """p and q; in float32, as all that is drawn, whatever the weights are in."""
        return ops.cast(self.std_prior, ms.float32), ops.cast(self.expert_weights_prior, ms.float32)

    def variances(self, chi: Tensor) -> Tensor:
        """v (r,)."""
        p, _ = self.priors()
        return ops.maximum(ops.mul(ops.exp(2 * p), chi), _LEAST_VARIANCE)

    def shares(self, normal: Tensor) -> Tensor:
        """w (N,)."""
        n, (_, q) = normal.shape[0], self.priors()
        alpha = ops.maximum(ops.exp(q), _EPS)
        log = ops.log(alpha)
        squares = ops.add((1 - 2 / n) / alpha, ops.reduce_sum(1 / alpha) / n**2)
        length = ops.sqrt(ops.maximum(squares, _EPS) + _EPS)
        return ops.softmax(ops.add(ops.mul(length, normal), ops.sub(log, ops.reduce_mean(log))), -1)

    def penalty(self) -> Tensor:
        """The divergences from the priors times `kl_loss_weight`, and Σw² with `use_entropy`; zero in evaluation mode.

        Formula: KL of Dirichlet(α) and Dirichlet(`dirichlet_prior`); of Wishart(e^(2p), r) and Wishart(I, r); and N
        times that of N(0, diag(v)) and N(0, I). v and w are those of the last pass.

        Differs: HF adds Σ log Γ(α) - Σ log Γ(α₀) to the first where it is to be subtracted.
        """
        if not self.training:
            return ops.zeros((), ms.float32)
        c, (p, q) = self.monte, self.priors()
        r, n = p.shape[0], q.shape[0]
        alpha, prior = ops.exp(q), c.dirichlet_prior
        total = ops.reduce_sum(alpha)
        known = n * math.lgamma(prior) - math.lgamma(n * prior)
        dirichlet = ops.lgamma(total) - ops.reduce_sum(ops.lgamma(alpha)) + known
        dirichlet = dirichlet + ops.reduce_sum((alpha - prior) * (ops.digamma(alpha) - ops.digamma(total)))
        wishart = 0.5 * r * (ops.reduce_sum(ops.exp(2 * p) - 2 * p) - r)
        v = self.variances(self.drawn.chi)
        normal = 0.5 * n * (ops.reduce_sum(v - ops.log(v)) - r)
        value = c.kl_loss_weight * (dirichlet + wishart + normal)
        return value + ops.reduce_sum(ops.square(self.shares(self.drawn.normal))) if c.use_entropy else value
