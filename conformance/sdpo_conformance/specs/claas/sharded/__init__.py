"""What CLaaS SDPO asks of an implementation under torch.distributed: its rules, and the known ways to break them."""
