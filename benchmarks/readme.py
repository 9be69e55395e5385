"""The measured part of the README, between its two comments, made from the committed results.

python -m benchmarks.readme             write it anew; the tests compare it with what is committed
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean
from textwrap import TextWrapper

from benchmarks.curves import markdown
from benchmarks.records import measured, read

README = Path(__file__).resolve().parent.parent / "README.md"
PLACE = re.compile(r"(<!-- python -m benchmarks\.readme -->\n).*?(<!-- end -->)", re.DOTALL)
RESNET, LENET = "akamaster_cifar10_resnet20", "sfd_mnist_lenet5"
GRADUAL, VIEWS = "gradual magnitude + KD, taps", "fipgeo, views=20, epochs=3, refresh=20"
WRAP = TextWrapper(120, break_on_hyphens=False, break_long_words=False)
SKETCH = "fipgeo, layer sketch, no input kept"
READOUT = "fipgeo, readout=True"


def pruned(network: str, zeros: float, method: str) -> str:
    """Mean accuracy; nothing where it was not measured."""
    try:
        case = f"{network}/sparsity={zeros:g}/inputs=1000"
        return f"{mean(measured('sparsify', case=case, method=method, figure='test_accuracy')):.1f}"
    except LookupError:
        return ""


def ahead() -> str:
    """In how many cases fipgeo ends above gradual pruning, by means over seeds, and how far behind at most."""
    cases = sorted({r["case"] for r in read("sparsify") if r["method"] == GRADUAL})
    ours, theirs = (
        [mean(measured("sparsify", case=case, method=method, figure="test_accuracy")) for case in cases]
        for method in ("fipgeo", GRADUAL)
    )
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    above, behind = sum(gain > 0 for gain in gains), -min(gains)
    return f"{above} of {len(cases)} cases measured so far, and {behind:.1f} points behind at most in the others"


def table() -> str:
    methods = ["magnitude", "magnitude, statistics re-estimated", "fipgeo"]
    levels = {RESNET: (0.7, 0.8, 0.9), LENET: (0.9, 0.95, 0.98)}
    rows = [
        [f"`{network}`", f"{zeros:.0%}".replace("%", " %"), *(pruned(network, zeros, method) for method in methods)]
        for network, several in levels.items()
        for zeros in several
    ]
    return markdown(["network", "zeros", *methods], rows)


def learned(method: str) -> str:
    about = {"case": "mnist_fashion/kept=50", "method": method}
    old, new = (measured("learn", figure=f"{which}_accuracy", **about) for which in ("old", "new"))
    seeds = f", mean of {len(old)} seeds" if len(old) > 1 else ""
    return f"{mean(old):.1f} % and {mean(new):.1f} %{seeds}"


def average(method: str) -> str:
    return f"{mean(measured('learn', case='split_cifar10/kept=50', method=method, figure='average_accuracy')):.1f} %"


def passes(method: str) -> str:
    return f"{measured('learn', 'passes', case='mnist_fashion/kept=50', method=method)[0]:g}"


def text() -> str:
    assert passes(VIEWS) == passes(SKETCH), "the sentence below gives one number for both"
    paragraphs = f"""
**Sparse without labels.** Accuracy (%) on all test images of pretrained networks, after one call of `fipgeo.sparsify`
with 1,000 unlabelled training images and its defaults (but for the share held out), beside global magnitude pruning.
Dense: {pruned(RESNET, 0, "dense")} (CIFAR-10 ResNet-20), {pruned(LENET, 0, "dense")} (MNIST LeNet-5).
`python -m benchmarks.sparsify` measures it.

{table()}
Gradual magnitude pruning with distillation of hidden features takes about the same time and comes with no certificate.
On the ResNet-20 it ends at {pruned(RESNET, 0.9, GRADUAL)} with 90 % zeros, where fipgeo has
{pruned(RESNET, 0.9, "fipgeo")}, and on LeNet-5 at {pruned(LENET, 0.95, GRADUAL)} with 95 %, where fipgeo has
{pruned(LENET, 0.95, "fipgeo")}; fipgeo is ahead in {ahead()}.
[Sparsity](docs/sparsity.md) has curves, more networks and methods, and how it was measured.

**Learning without forgetting.** A network that knows MNIST is taught Fashion-MNIST, one head of 20 outputs, in
{passes(VIEWS)} passes over the new data ({passes("fine-tuning")} for fine-tuning). Accuracy on all test images, digits
and clothes; `python -m benchmarks.learn` measures it, [Learning](docs/learning.md) has more.

- 50 unlabelled digits kept, in 20 views each: {learned(VIEWS)}.
- no digit kept, a sketch of what the layers saw in their place: {learned(SKETCH)}.
- fine-tuning: {learned("fine-tuning")}.

CIFAR-10 in five pairs of classes under one head, from a ResNet-8 that knows the first pair: a linear readout of all its
layers, remembered in closed form with no image kept, ends at {average(READOUT)} on average; replay by distillation,
with 50 images kept of each class, at {average("KD replay")}.
"""
    return "\n\n".join(part if part[0] in "|-" else WRAP.fill(part) for part in paragraphs.strip().split("\n\n"))


def rewritten(readme: str) -> str:
    """A README with its measured part made anew."""
    assert len(PLACE.findall(readme)) == 1, "README.md has lost the comments between which figures are written"
    return PLACE.sub(lambda found: f"{found[1]}\n{text()}\n\n{found[2]}", readme)


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
