"""An adapter: a name, and all that bears it, in a model or still outside it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mindspore import Parameter, nn

from msft_peft.backend import arguments
from msft_peft.backend.tree import Named, named_parameters
from msft_peft.config import PeftConfig
from msft_peft.core.keys import BASE, BESIDE, PREFIX
from msft_peft.core.layer import TunerLayer
from msft_peft.core.patch import Patch, place_of
from msft_peft.core.prompt import VirtualTokens, prompts_of
from msft_peft.core.replication import Blocks
from msft_peft.core.wrapper import ModulesToSaveWrapper, wrappers
from msft_peft.errors import AdapterNameError
from msft_peft.hosts import hf_names


@dataclass(frozen=True)
class Adapter:
    """A name, and all that bears it: in the model already, or prepared and still outside it.

    Attributes:
        name: the adapter's name.
        config: its config, targets resolved.
        patches: its Patch at each adapted layer's path.
        modules: its copy of each layer that it trains whole, by path.
        blocks: another list of blocks for the base model, if it asks for one.
        prompt: what it puts before the input, if its method does that.
    """

    name: str
    config: PeftConfig
    patches: dict[str, Patch]
    modules: dict[str, nn.Cell]
    blocks: Blocks | None = None
    prompt: VirtualTokens | None = None

    @property
    def prefix(self) -> str:
        """What stands before the keys of its tensors in HF's files."""
        return PREFIX if self.prompt is None else ""

    @property
    def inside(self) -> str:
        """What stands, after `prefix`, before the paths of the base model: beside a prompt it has no Tuner around."""
        return "" if self.prompt is None else BASE

    @property
    def targets(self) -> list[str]:
        """The paths of its target layers."""
        return [path for path, patch in self.patches.items() if not patch.auxiliary]

    def entries(self, model: nn.Cell) -> dict[str, Named]:
        """Its tensors by their keys in HF's files, see `core.keys.in_file`: weights, copies, and trained biases.

        `local` of each is the parameter's path once the adapter is in the model.
        """
        return self._tensors(model, {} if self.prompt is None else self.prompt.stored())

    def needed(self, model: nn.Cell) -> dict[str, Named]:
        """The tensors that loading must fill: `entries`, or all that a prompt's own encoder has."""
        if self.prompt is None or not self.prompt.reparametrised:
            return self.entries(model)
        return self._tensors(model, self.prompt.own())

    def accepted(self, model: nn.Cell) -> dict[str, Named]:
        """`needed`, and the keys of layers that share a weight with one before them: HF's files hold it again."""
        return self._tensors(model, {}, copies=True) if self.prompt is None else self.needed(model)

    def _tensors(self, model: nn.Cell, prompt: dict[str, Named], copies: bool = False) -> dict[str, Named]:
        place = f"prompt_encoder.{self.name}"
        found = {key: named._replace(local=f"{place}.{named.local}") for key, named in prompt.items()}
        hf_name, seen = hf_names(model), set()
        for path, patch in self.patches.items():
            for holder, attribute, suffix in patch.placed():
                p, (place, rest) = getattr(holder, attribute), place_of(suffix)
                # Of tied layers HF's files have both, and each its own layout.
                again = id(p) in seen and not (copies or patch.rides)
                if attribute in holder.unsaved or again:
                    continue
                seen.add(id(p))
                local = ".".join(part for part in (path, place, self.name, rest) if part)
                key = f"{hf_name(path)}.{suffix}" if holder is patch else BESIDE + suffix
                shape, blocks = holder.shape_of(attribute), holder.blocks_of(attribute)
                found[key] = Named(key, local, p, shape, blocks, patch.turned, holder.kept_of(attribute))
        for path, module in self.modules.items():
            for named in named_parameters(module, tied=True):
                owner, _, leaf = f"{path}.{named.key}".rpartition(".")
                key = f"{self.inside}{hf_name(owner)}.{leaf}"
                local = f"{self.inside}{path}.modules_to_save.{self.name}.{named.local}"
                found[key] = named._replace(key=key, local=local)
        return found | self.biases(model)

    def biases(self, model: nn.Cell) -> dict[str, Named]:
        """The base model's biases that it trains in place, with the paths that they have once it is in."""
        kind = getattr(self.config, "bias", "none")
        if kind == "none":
            return {}
        held, hf_name = held_ids(model), hf_names(model)
        adapted = set(self.patches) | {path for path, w in wrappers(model) if isinstance(w, TunerLayer)}
        found = {}
        for named in named_parameters(model):
            owner, _, leaf = named.key.rpartition(".")
            while owner.removesuffix(".base_layer") in adapted - {owner}:
                owner = owner.removesuffix(".base_layer")
            if leaf != "bias" or id(named.parameter) in held or (kind != "all" and owner not in self.patches):
                continue
            if lies_inside(owner, self.modules):
                continue  # trained as a part of the whole layer, in the copy
            if owner in adapted:
                inner = f"{owner}."
                while inner.removesuffix(".") in adapted:  # more than one wrapper where parameters are adapted
                    inner += "base_layer."
                named = named._replace(key=inner + leaf, local=inner + named.local.rpartition(".")[2])
            place, _, leaf = named.key.rpartition(".")
            key = f"{hf_name(owner)}{place.removeprefix(owner)}.{leaf}"
            found[key] = named._replace(key=key)
        return found


def adapter_in(model: nn.Cell, name: str) -> Adapter:
    """The adapter `name` as it is in the model.

    Raises:
        AdapterNameError: there is none of that name.
    """
    if arguments.adapter_name(name) not in configs_of(model):
        raise AdapterNameError(f"Adapter {name} not found. There are {sorted(configs_of(model))}.")
    found = [(path, w, w.held()[name]) for path, w in wrappers(model) if name in w.held()]
    patches = {path: cell for path, w, cell in found if isinstance(w, TunerLayer)}
    modules = {path: cell for path, w, cell in found if isinstance(w, ModulesToSaveWrapper)}
    prompts = prompts_of(model)
    prompt = None if prompts is None else prompts.held().get(name)
    return Adapter(name, configs_of(model)[name], patches, modules, prompt=prompt)


def invocations_of(model: nn.Cell, names: Iterable[str]) -> list[tuple[int, ...]]:
    """The token sequences that these adapters wait for, each once."""
    waiting = (getattr(configs_of(model)[name], "alora_invocation_tokens", None) for name in names)
    return list(dict.fromkeys(tuple(tokens) for tokens in waiting if tokens is not None))


def active_of(model: nn.Cell) -> list[str]:
    """The names of the adapters in use (or that would be, were they not disabled), in the order in which they act."""
    return [name for name in getattr(model, "peft_active", ()) if name in configs_of(model)]


def configs_of(model: nn.Cell) -> dict[str, PeftConfig]:
    """The configs of the adapters in the model, by name."""
    return getattr(model, "peft_config", {})


def check_name(name: str) -> None:
    """Raise AdapterNameError if `name` cannot name an adapter."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_\-]{1,100}", name):
        raise AdapterNameError(
            f"{name!r} cannot name an adapter: it must be 1 to 100 of the characters A-Z, a-z, 0-9, _ and -, since it "
            "becomes a part of parameter names (MindSpore allows no others there) and a folder's name."
        )
    if hasattr(nn.CellDict, name) or hasattr(nn.CellDict(), name):
        raise AdapterNameError(f"{name!r} cannot name an adapter: MindSpore's Cells have an attribute of that name.")


def lies_inside(path: str, others: Iterable[str]) -> bool:
    """Whether `path` is one of `others` or below one."""
    return any(path == other or path.startswith(other + ".") for other in others)


def held_ids(model: nn.Cell) -> set[int]:
    """Identities of all parameters that belong to adapters, not to the base model."""
    return {id(p) for _, w in wrappers(model) for cell in w.held().values() for p in cell.get_parameters()}


def biases_of(model: nn.Cell, name: str) -> list[Parameter]:
    """The biases that the adapter trains in place."""
    # Asked of every adapter whenever one is added: looking through the tree for each would be quadratic.
    if getattr(configs_of(model)[name], "bias", "none") == "none":
        return []
    return [named.parameter for named in adapter_in(model, name).biases(model).values()]
