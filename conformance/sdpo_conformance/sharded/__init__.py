"""Implementations judged under torch.distributed: meshes, how a case is cut over ranks, ranks with a watchdog."""
