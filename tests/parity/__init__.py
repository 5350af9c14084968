"""The parity suite: the same nets, weights and adapters in HF peft and in msft_peft, whole tensors compared."""
