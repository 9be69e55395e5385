"""The root held layer by layer, as rows or as products of activations and output derivatives.

In the order in which a root is made:

- `capture` finds the functions of a forward pass that are linear in parameters.
- `plan` chooses for each parameter between rows and factors, by flops, memory and what fits.
- `build` differentiates the outputs piece by piece; `store` is the memory that is filled.
- `factors` has one block for every kind of layer: products, rows and inner products.
- `segment` multiplies a run of batches by vectors; `gram` makes R R^T and the diagonal of R^T R.
- `root` is the linear operator.
"""

from fipgeo.jacobian.factored.root import FactoredRoot, gram_by_parameters

__all__ = ["FactoredRoot", "gram_by_parameters"]
