"""Calibrated pinhole cameras and the geometry between two of them.

World: x right, y forward, z up, metres. Camera: x right, y down, z along the optical axis. Pixels (u, v) run right and
down; pixel (i, j) covers [j, j + 1) x [i, i + 1), so its centre is (j + 1/2, i + 1/2), as in
``grid_sample(align_corners=False)``. Everything is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MIN_SIDE = 16


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera; a world point X is at R X + t in the camera's frame and at K (R X + t) in homogeneous pixels.

    Args:
        K: intrinsics (3, 3), upper triangular with last row 0 0 1, pixels.
        R: rotation world to camera (3, 3).
        t: translation world to camera (3,), metres.
        height: of the image, pixels.
        width: of the image, pixels.

    Raises:
        ValueError: a wrong shape, numbers that are not finite, ``K`` singular or no intrinsics, ``R`` no rotation, an
            image with a side under 16 pixels.
    """

    K: Float[Tensor, "3 3"]
    R: Float[Tensor, "3 3"]
    t: Float[Tensor, "3"]
    height: int
    width: int

    def __post_init__(self) -> None:
        for name, shape in (("K", (3, 3)), ("R", (3, 3)), ("t", (3,))):
            value = torch.as_tensor(getattr(self, name), dtype=torch.float64)
            if value.shape != shape or not value.isfinite().all():
                raise ValueError(f"{name} of shape {tuple(value.shape)} must be finite and of shape {shape}")
            object.__setattr__(self, name, value)
        below = self.K[[1, 2, 2, 2], [0, 0, 1, 2]]
        if min(self.K[0, 0], self.K[1, 1]) <= 0 or below.tolist() != [0, 0, 0, 1]:
            raise ValueError(f"K={self.K.tolist()} must have positive focal lengths, zeros below and 1 in the corner")
        if (self.R @ self.R.mT - torch.eye(3)).abs().max() > 1e-6 or torch.linalg.det(self.R) < 0:
            raise ValueError(f"R={self.R.tolist()} must be a rotation")
        if min(self.height, self.width) < MIN_SIDE:
            raise ValueError(f"size={(self.height, self.width)} is too small: {MIN_SIDE} pixels a side or more")

    @property
    def centre(self) -> Float[Tensor, "3"]:
        """The camera's position in the world."""
        return -self.R.mT @ self.t

    @property
    def world_to_camera(self) -> Float[Tensor, "4 4"]:
        top = torch.cat([self.R, self.t[:, None]], 1)
        return torch.cat([top, top.new_tensor([[0, 0, 0, 1]])])

    @property
    def camera_to_world(self) -> Float[Tensor, "4 4"]:
        top = torch.cat([self.R.mT, self.centre[:, None]], 1)
        return torch.cat([top, top.new_tensor([[0, 0, 0, 1]])])

    def pixels(self) -> Float[Tensor, "h w 2"]:
        """Where the centres of all pixels are."""
        v, u = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (self.height, self.width))
        return torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)

    def rays(self, pixels: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 3"]:
        """World directions through pixels, one metre long along the optical axis, so that depth z is at centre + z * ray."""
        return homogeneous(pixels) @ (torch.linalg.inv(self.K).mT @ self.R)

    def project(self, points: Float[Tensor, "*n 3"]) -> tuple[Float[Tensor, "*n 2"], Float[Tensor, "*n"]]:
        """Pixels and z-depth of world points; the pixels of a point that is not in front of the camera are NaN."""
        x = points @ self.R.mT + self.t
        depth = x[..., 2]
        image = x @ self.K.mT
        pixels = image[..., :2] / image[..., 2:]
        return pixels.masked_fill((depth <= 0)[..., None], math.nan), depth

    def lift(self, pixels: Float[Tensor, "*n 2"], depth: Float[Tensor, "*n"]) -> Float[Tensor, "*n 3"]:
        """The world points at these pixels and z-depths."""
        return self.centre + depth[..., None] * self.rays(pixels)

    def holds(self, pixels: Float[Tensor, "*n 2"]) -> Bool[Tensor, "*n"]:
        """Whether pixels lie in the image; NaN does not."""
        u, v = pixels.unbind(-1)
        return (u >= 0) & (u < self.width) & (v >= 0) & (v < self.height)


def homogeneous(pixels: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 3"]:
    """(u, v, 1)."""
    return torch.cat([pixels, torch.ones_like(pixels[..., :1])], -1)


def intrinsics(height: int, width: int, fov: float) -> Float[Tensor, "3 3"]:
    """Square pixels, principal point in the middle, ``fov`` degrees wide.

    Raises:
        ValueError: ``fov`` outside (0, 180).
    """
    if not 0 < fov < 180:
        raise ValueError(f"fov={fov} must lie between 0 and 180 degrees")
    f = width / 2 / math.tan(math.radians(fov) / 2)
    return torch.tensor([[f, 0, width / 2], [0, f, height / 2], [0, 0, 1]], dtype=torch.float64)


def look_at(
    eye: Float[Tensor, "3"], target: Float[Tensor, "3"], size: tuple[int, int], fov: float = 70.0, roll: float = 0.0
) -> Camera:
    """A camera at ``eye`` with ``target`` in the middle of its image, turned clockwise by ``roll`` radians about its axis.

    Raises:
        ValueError: ``target`` is ``eye``, or lies straight above or below it.
    """
    forward = target - eye
    right = torch.linalg.cross(forward, forward.new_tensor([0, 0, 1]))
    if right.norm() < 1e-9:
        raise ValueError(f"target={target.tolist()} must lie aside of eye={eye.tolist()}, not on its vertical")
    z, x = forward / forward.norm(), right / right.norm()
    R = torch.stack([x, torch.linalg.cross(z, x), z])
    c, s = math.cos(roll), math.sin(roll)
    R = R.new_tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]]) @ R
    return Camera(intrinsics(*size, fov), R, -R @ eye, *size)


def beside(camera: Camera, baseline: float) -> Camera:
    """The right camera of a rectified pair: the same, moved by ``baseline`` metres along its own x axis.

    Raises:
        ValueError: ``baseline`` not positive.
    """
    if baseline <= 0:
        raise ValueError(f"baseline={baseline} must be positive")
    return Camera(camera.K, camera.R, camera.t - camera.t.new_tensor([baseline, 0, 0]), camera.height, camera.width)


def relative(a: Camera, b: Camera) -> tuple[Float[Tensor, "3 3"], Float[Tensor, "3"]]:
    """R, t from the frame of ``a`` to that of ``b``: x_b = R x_a + t."""
    R = b.R @ a.R.mT
    return R, b.t - R @ a.t


def essential(a: Camera, b: Camera) -> Float[Tensor, "3 3"]:
    """E = [t]x R, with x_b^T E x_a = 0 for a point's directions in the two cameras' frames."""
    R, t = relative(a, b)
    return cross_matrix(t) @ R


def fundamental(a: Camera, b: Camera) -> Float[Tensor, "3 3"]:
    """F = K_b^-T E K_a^-1, with x_b^T F x_a = 0 for a point's homogeneous pixels; F x_a is its epipolar line in ``b``."""
    return torch.linalg.inv(b.K).mT @ essential(a, b) @ torch.linalg.inv(a.K)


def homography(a: Camera, b: Camera, normal: Float[Tensor, "3"], offset: float) -> Float[Tensor, "3 3"]:
    """H = K_b (R + t n^T / d) K_a^-1: pixels of ``a`` to pixels of ``b`` for points on the plane n . x = d in the frame of ``a``.

    Raises:
        ValueError: the plane goes through the centre of ``a``.
    """
    if offset == 0:
        raise ValueError("offset=0: the plane goes through the camera's centre")
    R, t = relative(a, b)
    return b.K @ (R + torch.outer(t, normal) / offset) @ torch.linalg.inv(a.K)


def cross_matrix(v: Float[Tensor, "3"]) -> Float[Tensor, "3 3"]:
    """[v]x, with [v]x w = v x w."""
    x, y, z = v.tolist()
    return v.new_tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])
