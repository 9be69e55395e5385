"""Optimisers that learn new data along directions which a protected function does not feel."""

from fipgeo.optim.fip import FIP

__all__ = ["FIP"]
