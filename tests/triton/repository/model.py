"""The product's model with the deterministic engine instead of the real one."""

from fake_engine import FakeEngine
from morph_backend.model import TritonPythonModel as ProductModel


class TritonPythonModel(ProductModel):
    def make_engine(self, config, listener):
        return FakeEngine(config, listener)
