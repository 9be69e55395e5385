"""Plots of result records: Axes in, Axes out.

Each function draws numbers that were computed elsewhere on the one Axes it is given (or on a new figure)
and returns that Axes. Nothing is shown, saved or closed, and no style, backend or rcParams entry is
changed. Calling a function again on the same Axes overlays another series in the next colour. Colours are
those of the user's property cycle; while that is matplotlib's own default, the Okabe-Ito palette takes its
place, which stays legible for colour-blind readers.

matplotlib.pyplot is imported only when a new figure has to be made, so importing this module chooses no
backend.
"""

from fipgeo.plotting._contours import GridRecord
from fipgeo.plotting.coefficients import plot_coefficient_depth, plot_coefficients
from fipgeo.plotting.density import DensityRecord, plot_density
from fipgeo.plotting.layers import plot_layer_sparsity
from fipgeo.plotting.matrices import plot_interference, plot_metric
from fipgeo.plotting.path import PathRecord, plot_path
from fipgeo.plotting.planes import plot_contours, plot_path_projection, plot_plane
from fipgeo.plotting.profile import ProfileRecord, plot_profile
from fipgeo.plotting.spectrum import SpectrumRecord, plot_spectrum
from fipgeo.plotting.svg import figure_svg
from fipgeo.plotting.tasks import AccuracyRecord, plot_accuracy

__all__ = [
    "AccuracyRecord",
    "DensityRecord",
    "GridRecord",
    "PathRecord",
    "ProfileRecord",
    "SpectrumRecord",
    "figure_svg",
    "plot_accuracy",
    "plot_coefficient_depth",
    "plot_coefficients",
    "plot_contours",
    "plot_density",
    "plot_interference",
    "plot_layer_sparsity",
    "plot_metric",
    "plot_path",
    "plot_path_projection",
    "plot_plane",
    "plot_profile",
    "plot_spectrum",
]
