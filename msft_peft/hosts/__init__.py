"""What differs between model libraries: one file for each, behind `Host`. Plain Cells need nothing."""

from msft_peft.hosts.blocks import PLACES, blocks_path, cell_lists
from msft_peft.hosts.cells import parameter_site
from msft_peft.hosts.models import describe, hf_names, input_table, model_config, output_head
from msft_peft.hosts.site import Site
from msft_peft.hosts.tokenizers import encode, tokenizer_name

__all__ = [
    "PLACES",
    "Site",
    "blocks_path",
    "cell_lists",
    "describe",
    "encode",
    "hf_names",
    "input_table",
    "model_config",
    "output_head",
    "parameter_site",
    "tokenizer_name",
]
