"""What differs between model libraries; today plain Cells (MindSpore's own layers and classes of the same shape)."""

from msft_peft.hosts.cells import Site, describe, input_table, model_config, output_head, parameter_site

__all__ = ["Site", "describe", "input_table", "model_config", "output_head", "parameter_site"]
