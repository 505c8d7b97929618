from tests.tuning.conftest import model

__all__ = ["model"]
