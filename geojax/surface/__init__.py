"""Loss and other metrics on lines and planes through weight space, and directions to walk in.

A direction is a pytree like the parameters: an eigenvector, a random one, a difference of points.
"""

from geojax.surface.directions import Scope, filter_normalize, random_direction
from geojax.surface.faces import Face, faces
from geojax.surface.lines import Barrier, Line, along, barrier, line
from geojax.surface.planes import Frame, Plane, Projection, frame, plane
from geojax.surface.trajectories import Center, PrincipalDirections, principal_directions

__all__ = [
    "Barrier",
    "Center",
    "Face",
    "Frame",
    "Line",
    "Plane",
    "PrincipalDirections",
    "Projection",
    "Scope",
    "along",
    "barrier",
    "faces",
    "filter_normalize",
    "frame",
    "line",
    "plane",
    "principal_directions",
    "random_direction",
]
