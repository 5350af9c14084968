"""What differs between model libraries; today plain Cells (MindSpore's own layers and classes of the same shape)."""

from msft_peft.hosts.blocks import PLACES, blocks_path, cell_lists
from msft_peft.hosts.cells import Site, describe, input_table, model_config, output_head, parameter_site
from msft_peft.hosts.tokenizers import encode, tokenizer_name

__all__ = [
    "PLACES",
    "Site",
    "blocks_path",
    "cell_lists",
    "describe",
    "encode",
    "input_table",
    "model_config",
    "output_head",
    "parameter_site",
    "tokenizer_name",
]
