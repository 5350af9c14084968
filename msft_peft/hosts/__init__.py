"""What differs between model libraries: one file for each, behind `Host`. Plain Cells need nothing."""

from msft_peft.hosts.blocks import PLACES, all_blocks, blocks_path, cell_lists
from msft_peft.hosts.cells import parameter_site
from msft_peft.hosts.mindtorch_fixes import plain_dtypes
from msft_peft.hosts.models import (
    as_cell,
    class_of,
    describe,
    facade,
    hf_names,
    input_table,
    model_config,
    original,
    output_head,
    settle,
    signature,
)
from msft_peft.hosts.site import Site
from msft_peft.hosts.tokenizers import encode, tokenizer_name

__all__ = [
    "PLACES",
    "Site",
    "all_blocks",
    "as_cell",
    "blocks_path",
    "cell_lists",
    "class_of",
    "describe",
    "encode",
    "facade",
    "hf_names",
    "input_table",
    "model_config",
    "original",
    "output_head",
    "parameter_site",
    "plain_dtypes",
    "settle",
    "signature",
    "tokenizer_name",
]
