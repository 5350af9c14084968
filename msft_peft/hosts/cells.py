"""Plain Cells: which layers can be tuned, and how each of them holds and applies its weight."""

from mindspore import mint, nn

from msft_peft.backend.ops import ConvOp, DenseOp, EmbeddingOp
from msft_peft.backend.tree import get_child
from msft_peft.hosts.host import Host
from msft_peft.hosts.site import ATTENTION, LINEAR, Site


def _dense(cell: nn.Cell, path: str) -> Site:
    weight = cell.weight
    activation = cell.activation if getattr(cell, "activation_flag", False) else None
    return Site(
        path,
        LINEAR,
        weight.shape[1],
        weight.shape[0],
        tuple(weight.shape),
        DenseOp(),
        cell,
        activation=activation,
    )


def _transposed_dense(cell: nn.Cell, path: str) -> Site:
    rows, columns = cell.weight.shape
    return Site(path, LINEAR, rows, columns, (columns, rows), DenseOp(), cell, transposed=True)


def _embedding(cell: nn.Cell, path: str) -> Site:
    name = "embedding_table" if isinstance(cell, nn.Embedding) else "weight"
    table = getattr(cell, name)
    vocabulary, dim = table.shape
    op = EmbeddingOp(getattr(cell, "embed_scale", 1.0))
    return Site(path, "embedding", vocabulary, dim, (vocabulary, dim), op, cell, weight_name=name)


def _per_side(padding: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """MindSpore's padding as (before, after) of each dimension."""
    if isinstance(padding, int):
        return (padding,) * (2 * dims)
    return tuple(padding) if len(padding) == 2 * dims else tuple(n for n in padding for _ in range(2))


def _conv(cell: nn.Cell, path: str) -> Site:
    dims = 1 if isinstance(cell, nn.Conv1d) else 3 if isinstance(cell, nn.Conv3d) else 2
    stored = tuple(cell.weight.shape)
    shape = stored[:2] + stored[-dims:]
    # nn.Conv1d keeps two-dimensional settings whose last entries are its own.
    padding = _per_side(cell.padding, 2 if dims == 1 else dims)[-2 * dims :]
    op = ConvOp(dims, cell.in_channels, cell.stride[-dims:], cell.dilation[-dims:], cell.pad_mode, padding)
    return Site(
        path,
        f"conv{dims}d",
        cell.in_channels,
        cell.out_channels,
        shape,
        op,
        cell,
        groups=cell.group,
        channel_axis=1,
    )


def _attention(cell: nn.Cell, path: str) -> Site | None:
    inner = (describe(child, path) for child in cell._cells.values() if child is not None)
    first = next((site for site in inner if site is not None and site.kind == LINEAR), None)
    return None if first is None else Site(path, ATTENTION, first.in_features, first.in_features, (), first.op, cell)


def _norm(cell: nn.Cell, path: str) -> Site | None:
    gamma = "gamma" in cell._params
    weight, bias = ("gamma", "beta") if gamma else ("weight", "bias")
    if cell._params.get(weight) is None:
        return None
    shape = tuple(cell._params[weight].shape)
    axis = 1 if isinstance(cell, _CHANNEL_NORMS) else -1
    return Site(
        path,
        "norm",
        shape[-1],
        shape[-1],
        shape,
        DenseOp(),
        cell,
        weight_name=weight,
        bias_name=bias,
        channel_axis=axis,
    )


_LAYER_NORMS = (nn.LayerNorm, mint.nn.LayerNorm)
_CHANNEL_NORMS = (nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


_LAYERS = (
    ((nn.Dense, mint.nn.Linear), _dense),
    ((nn.Embedding, mint.nn.Embedding), _embedding),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    ((*_LAYER_NORMS, *_CHANNEL_NORMS), _norm),
)


def describe(cell: nn.Cell, path: str) -> Site | None:
    """The Site that `cell` is, or None if it is no layer that can be tuned."""
    # MindPet's delta Cells are dense layers that do more than to apply their weight: an update of it would not be all.
    if any(name.startswith("mindpet_delta_") for name in (*cell._params, *cell._cells)):
        return None
    for classes, build in _LAYERS:
        if isinstance(cell, classes):
            return build(cell, path)
    norm = own_norm(cell, path)
    if norm is not None:
        return norm
    if callable(getattr(type(cell), "keys_and_values", None)):
        return _attention(cell, path)
    # GPT-2's Conv1D exists in several libraries, none of which we import: known by its name and its two sizes.
    if type(cell).__name__ == "Conv1D" and hasattr(cell, "nf") and len(cell.weight.shape) == 2:
        return _transposed_dense(cell, path)
    return None


def own_norm(cell: nn.Cell, path: str) -> Site | None:
    """The Site of a norm that some library made itself: known by its name, one factor a channel and maybe a bias."""
    shapes = {name: p.shape for name, p in cell._params.items() if p is not None}
    factors = {"weight", "gamma"} & set(shapes)
    fits = (
        len(factors) == 1 and set(shapes) <= {*factors, "bias", "beta"} and all(len(s) == 1 for s in shapes.values())
    )
    return _norm(cell, path) if fits and "Norm" in type(cell).__name__ else None


def parameter_site(model: nn.Cell, owner: str, name: str) -> Site:
    """The Site that the parameter `name` of the cell at path `owner` is, adapters on it or not."""
    layer = get_child(model, owner)
    while "base_layer" in layer._cells and name not in layer._params:
        layer = layer._cells["base_layer"]
    p = layer._params[name]
    rows, columns = (1, 1, *p.shape)[-2:]
    return Site(owner, "parameter", columns, rows, tuple(p.shape), DenseOp(), layer, weight_name=name)


HOST = Host("cells", owns=lambda thing: True, describe=describe)
