"""The rules of verl's forward_kl_topk as tests."""
