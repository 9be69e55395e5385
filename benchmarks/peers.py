"""The libraries that the metric benchmark compares with, each behind a few lines, and a reference apart from them.

All products are of g = (1 / N) sum_i J_i^T J_i. curvlinops' GGN of a mean squared error is 2 / C times that, C being
the outputs of an example (`CurvlinopsProduct.scale`); nngeometry's Fisher of a regression is g itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from benchmarks.measure import Unavailable
from benchmarks.models import Case

PACKAGES = {
    "curvlinops": "curvlinops-for-pytorch",
    "nngeometry": "nngeometry",
    "laplace": "laplace-torch",
    "asdl": "asdfghjkl",
    "backpack": "backpack-for-pytorch",
    "transformers": "transformers",
    "scipy": "scipy",
}


def load(name: str) -> Any:
    """A module of a peer.

    Raises:
        Unavailable: It cannot be imported, for whatever reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:
        raise Unavailable(f"{name.split('.')[0]} cannot be imported: {type(error).__name__}") from error


def versions() -> dict[str, str]:
    """Every peer with its version, or why it is absent; for the environment of the records."""
    found = {}
    for module, package in PACKAGES.items():
        try:
            load(module if module != "laplace" else "laplace.curvature")
            found[module] = importlib.metadata.version(package)
        except Unavailable as error:
            cause = error.__cause__
            missing = f" ({cause.name} is missing)" if isinstance(cause, ModuleNotFoundError) and cause.name else ""
            found[module] = f"absent: {error}{missing}"
        except importlib.metadata.PackageNotFoundError:
            found[module] = "of unknown version"
    return found


def reference(case: Case, *, double: bool = False) -> Callable[[Tensor], Tensor]:
    """The product g v by one forward and one reverse derivative, nothing kept: the judge of everybody's residuals.

    Args:
        case: Network and inputs.
        double: In float64. Where units sit at the kink of a ReLU, this is another metric.

    Returns:
        `[D]` or `[k, D]` to the same shape and the dtype of the vector.
    """
    own = case.fresh() if double else case
    model = own.model.double() if double else own.model
    params = {name: p.detach() for name, p in own.params.items()}
    sizes = [p.numel() for p in params.values()]
    buffers = dict(model.named_buffers())

    def product(v: Tensor) -> Tensor:
        if v.dim() == 2:
            return torch.stack([product(row) for row in v])
        flat = v.double() if double else v
        parts = zip(params.items(), flat.split(sizes), strict=True)
        tangent = {name: part.reshape(p.shape) for (name, p), part in parts}
        total = torch.zeros_like(flat)
        for batch in own.batches:
            x = _double(batch) if double else batch

            def outputs(weights: Mapping[str, Tensor], x: Any = x) -> Tensor:
                return functional_call(model, {**weights, **buffers}, (x,))

            moved = jvp(outputs, (params,), (tangent,))[1]
            (back,) = vjp(outputs, params)[1](moved)
            total += torch.cat([back[name].reshape(-1) for name in params])
        return (total / case.num_examples).to(v.dtype)

    return product


def pulled_back(case: Case, seed: int = 2) -> Tensor:
    """J^T u for a random u: the right-hand side of the solves, of the kind that gradients are; `[D]`, norm 1."""
    generator = torch.Generator().manual_seed(1000 * case.seed + seed)
    total = torch.zeros(case.num_weights, device=case.device)
    for batch in case.batches:
        outputs = case.model(batch)
        u = torch.randn(outputs.shape, generator=generator).to(outputs)
        grads = torch.autograd.grad((outputs * u).sum(), list(case.params.values()))
        total += torch.cat([g.reshape(-1) for g in grads])
    return total / total.norm()


class CurvlinopsProduct:
    """The Gauss-Newton matrix of curvlinops for a mean squared error, scale times g.

    Attributes:
        scale: 2 / C.
        products: Vectors that it was applied to so far.
    """

    def __init__(self, case: Case) -> None:
        package = load("curvlinops")
        data = []
        for batch in case.batches:
            with torch.no_grad():
                data.append((batch, torch.zeros_like(case.model(batch))))
        loss = nn.MSELoss(reduction="mean")
        params = list(case.params.values())
        self.operator = package.GGNLinearOperator(
            case.model, loss, params, data, check_deterministic=False, batch_size_fn=_length
        )
        self.scale = 2 / case.num_outputs
        self.products = 0
        self.device, self.dim = case.device, case.num_weights

    def matvec(self, v: Tensor) -> Tensor:
        """The product scale g v for `[D]`."""
        self.products += 1
        return (self.operator @ v).detach()

    def matmat(self, columns: Tensor) -> Tensor:
        """The products scale g V for `[D, k]`."""
        self.products += columns.shape[1]
        return (self.operator @ columns).detach()

    def for_scipy(self, damping: float = 0.0) -> Any:
        """The operator scale (g + damping I) for scipy's solvers, in single precision."""
        linalg = load("scipy.sparse.linalg")

        def apply(x: np.ndarray) -> np.ndarray:
            v = torch.as_tensor(x.reshape(-1), dtype=torch.float32, device=self.device)
            out = self.matvec(v)
            return (out + (self.scale * damping) * v if damping else out).cpu().numpy()

        return linalg.LinearOperator((self.dim, self.dim), matvec=apply, dtype=np.dtype("float32"))


def eigenpairs(product: CurvlinopsProduct, k: int, tol: float, seed: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues of g and their vectors `[k, D]`, by scipy's eigsh on curvlinops' operator."""
    linalg = load("scipy.sparse.linalg")
    start = np.random.default_rng(seed).standard_normal(product.dim).astype("float32")
    values, vectors = linalg.eigsh(product.for_scipy(), k=k, which="LA", tol=tol, v0=start)
    order = np.argsort(-values)
    rows = torch.from_numpy(np.ascontiguousarray(vectors.T[order])).to(product.device)
    return torch.from_numpy(values[order].copy()).to(product.device) / product.scale, rows


def solved(product: CurvlinopsProduct, rhs: Tensor, damping: float, rtol: float) -> Tensor:
    """(g + damping I)^{-1} rhs by scipy's conjugate gradients on curvlinops' operator."""
    linalg = load("scipy.sparse.linalg")
    scaled = (rhs * product.scale).cpu().numpy()
    x, _ = linalg.cg(product.for_scipy(damping), scaled, rtol=rtol, maxiter=2000)
    return torch.from_numpy(np.asarray(x, dtype="float32")).to(rhs.device)


def nngeometry_product(case: Case) -> Callable[[Tensor], Tensor]:
    """The product g v by nngeometry's implicit Fisher of a regression.

    Raises:
        Unavailable: The package is absent, or the inputs are not one tensor.
    """
    if not isinstance(case.inputs, Tensor):
        raise Unavailable("nngeometry takes tensors only")
    metrics, objects = load("nngeometry.metrics"), load("nngeometry.object")
    case, inputs = case.fresh(), case.inputs  # its hooks stay on the network when it fails
    layers = load("nngeometry.layercollection").LayerCollection.from_model(case.model)
    if layers.numel() != case.num_weights:
        raise Unavailable("nngeometry leaves out weights of this network")
    data = torch.utils.data.TensorDataset(inputs, torch.zeros(case.num_examples, device=case.device))
    loader = torch.utils.data.DataLoader(data, batch_size=min(256, case.num_examples))
    fisher = metrics.FIM(
        case.model,
        loader,
        objects.PMatImplicit,
        variant="regression",
        device=str(case.device),
        function=lambda *d: case.model(d[0]),
        layer_collection=layers,
    )
    return lambda v: fisher.mv(objects.PVector(layers, vector_repr=v)).to_torch().detach()


def jacobian_builders(case: Case) -> dict[str, Callable[[], Tensor]]:
    """Ways to build the whole Jacobian `[N, C, D]`, by name; an absent peer raises `Unavailable` when called."""
    params = {name: p.detach() for name, p in case.params.items()}
    buffers = dict(case.model.named_buffers())

    def rows_of_one(x: Any) -> Tensor:
        one = x[None] if isinstance(x, Tensor) else {key: value[None] for key, value in x.items()}
        found = jacrev(lambda w: functional_call(case.model, {**w, **buffers}, (one,))[0])(params)
        return torch.cat([found[name].flatten(1) for name in params], dim=1)

    def by_torch() -> Tensor:
        return torch.cat([vmap(rows_of_one)(batch) for batch in case.batches])

    def by_laplace(module: str, backend: str) -> Callable[[], Tensor]:
        def build() -> Tensor:
            if not isinstance(case.inputs, Tensor):
                raise Unavailable("laplace's backends take tensors only")
            load(module)
            own = case.fresh()
            own.model.output_size = case.num_outputs  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            interface = getattr(load("laplace.curvature"), backend)(own.model, "regression")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows, _ = interface.jacobians(own.inputs)
            return rows.detach()

        return build

    return {
        "torch vmap(jacrev)": by_torch,
        "laplace, curvlinops": by_laplace("curvlinops", "CurvlinopsGGN"),
        "laplace, asdl": by_laplace("asdl", "AsdlGGN"),
        "laplace, BackPACK": by_laplace("backpack", "BackPackGGN"),
    }


def _length(batch: Any) -> int:
    return len(batch) if isinstance(batch, Tensor) else len(next(iter(batch.values())))


def _double(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    return {key: _double(value) for key, value in batch.items()}
