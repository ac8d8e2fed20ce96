"""The Triton side: the model that Triton loads, admission, the response path, metrics, and the launcher."""
