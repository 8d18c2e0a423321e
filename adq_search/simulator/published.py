"""ResNet-18 on ImageNet, from what HAWQ-V3's authors published of its layers.

The repository's `ILP.ipynb` [Yao2021]_ lists, for the 19 convolutions between the first and the
last layer, the mean Hessian trace, the squared weight perturbation at 4 bits, and the operations.
Half trace times perturbation is HAWQ's prediction of the loss increase; we take it for what a prior
would say. What "training" finds differs from it as real networks do: every layer and width is off
by a factor with a log-normal spread of 0.5, and neighbours interact.

The perturbation of a uniform quantizer falls with the square of its number of steps: the published
8-bit values lie below the 4-bit ones by (255 / 15)^2 = 289, give or take 15 %. So other widths
follow from 4 bits. The scale is set so that uniform 4 bits are predicted to lose 0.05 nats.

.. [Yao2021] Yao et al. HAWQ-V3. ICML 2021. https://github.com/Zhen-Dong/HAWQ, MIT licence.
"""

from __future__ import annotations

import numpy as np

from adq_search.sensitivity import SensitivityTable
from adq_search.simulator._problem import SimulatedProblem
from adq_search.space import Group, SearchSpace

#: Convolution, trace / weights, squared perturbation at 4 bits, millions of operations.
LAYERS: tuple[tuple[str, float, float, float], ...] = (
    ("layer1.0.conv1", 0.06857826, 6.7430, 115.605504),
    ("layer1.0.conv2", 0.03162379, 3.9691, 115.605504),
    ("layer1.1.conv1", 0.03298575, 3.3281, 115.605504),
    ("layer1.1.conv2", 0.01205663, 2.6796, 115.605504),
    ("layer2.0.conv1", 0.02222431, 4.7277, 57.802752),
    ("layer2.0.conv2", 0.00596336, 10.5966, 115.605504),
    ("layer2.0.downsample.0", 0.06931772, 0.6827, 6.422528),
    ("layer2.1.conv1", 0.00807129, 9.0942, 115.605504),
    ("layer2.1.conv2", 0.00372905, 4.8857, 115.605504),
    ("layer3.0.conv1", 0.00530698, 10.7599, 57.802752),
    ("layer3.0.conv2", 0.00209011, 21.7546, 115.605504),
    ("layer3.0.downsample.0", 0.00737569, 0.8603, 6.422528),
    ("layer3.1.conv1", 0.00210454, 14.5324, 115.605504),
    ("layer3.1.conv2", 0.00151197, 10.9651, 115.605504),
    ("layer4.0.conv1", 0.00158041, 18.7706, 57.802752),
    ("layer4.0.conv2", 0.00078146, 36.4044, 115.605504),
    ("layer4.0.downsample.0", 0.00451841, 3.1572, 6.422528),
    ("layer4.1.conv1", 0.00098745, 29.6994, 115.605504),
    ("layer4.1.conv2", 0.00072944, 17.4016, 115.605504),
)
WEIGHT_BITS = (2, 3, 4, 5, 6, 8)
INPUT_BITS = 8
_UNIFORM_4_BITS = 0.05
_SPREAD = 0.5
#: Neighbours lose up to this share of the geometric mean of what they lose alone.
_INTERACTION = 0.2
#: Operations of the smallest convolution, millions; all others are multiples of it.
_UNIT = 6.422528


def published_problem(*, seed: int, noise: float = 0.05, epochs: int = 9) -> SimulatedProblem:
    """Return the problem with hidden losses drawn by the seed.

    Choices are weight bits, inputs stay at 8 bits, and the cost is the number of bit operations.

    Args:
        seed: Of the factors between prediction and truth, and of the interactions.
        noise: Standard deviation of the logarithm of a measured KL.
        epochs: Length of a learning curve.
    """
    rng = np.random.default_rng(seed)
    bits = np.array(WEIGHT_BITS)
    at_4_bits = np.array([trace * perturbation for _, trace, perturbation, _ in LAYERS])
    predicted = at_4_bits[:, None] * (15.0 / (2.0**bits - 1.0)) ** 2
    predicted *= _UNIFORM_4_BITS / at_4_bits.sum()
    hidden = predicted * rng.lognormal(0.0, _SPREAD, predicted.shape)
    hidden = np.minimum.accumulate(hidden, axis=1)  # more bits never lose more
    together = np.sqrt(hidden[:-1, :, None] * hidden[1:, None, :])
    pairs = _INTERACTION * rng.uniform(size=(len(LAYERS) - 1, 1, 1)) * together
    units = np.array([round(ops / _UNIT) for *_, ops in LAYERS])
    names = tuple(name for name, *_ in LAYERS)
    groups = tuple(
        Group(name, (name,), WEIGHT_BITS, (INPUT_BITS,), schemes=("lsq",)) for name in names
    )
    weights = {
        (name, "lsq", b): float(predicted[i, c])
        for i, name in enumerate(names)
        for c, b in enumerate(WEIGHT_BITS)
    }
    prior = SensitivityTable("hawq", weights, {(name, "lsq", INPUT_BITS): 0.0 for name in names})
    space = SearchSpace(names, groups)
    return SimulatedProblem(
        space, prior, hidden, pairs, units[:, None] * bits[None, :], noise, epochs
    )
