"""The tile table, and where the kernels say that they cannot run."""

import pytest
import torch

backend = pytest.importorskip("fused_infonce.backends.triton.backend", reason="triton is not installed")

KERNELS = ("statistics", "columns", "coefficients", "gradient", "profile", "dense", "dense_gradient")


def test_every_architecture_has_a_tile():
    from fused_infonce.backends.triton import tiles

    for arch in (*tiles.TABLE, *tiles.PARENT):
        for dtype in tiles.CLASSES:
            for d in (1, 16, 17, 128, 200, 512, 513, 4096):
                for kernel in (
                    "statistics",
                    "columns",
                    "coefficients",
                    "gradient",
                    "profile",
                    "dense",
                    "dense_gradient",
                ):
                    if kernel == "gradient" and d > tiles.STREAMING_MAX_D[dtype] and arch != tiles.INTERPRETER:
                        with pytest.raises(ValueError, match="no tile for gradient"):
                            tiles.tile(arch, kernel, dtype, d)
                        continue
                    tile = tiles.tile(arch, kernel, dtype, d)
                    assert min(tile.block_m, tile.block_n, tile.block_d) >= 16
                    assert kernel != "gradient" or d <= tile.block_d < 2 * max(d, 16)


def test_float32_rows_have_larger_tiles_where_tf32_is_allowed(monkeypatch, precision):
    from fused_infonce.backends.triton import launch, tiles

    side = launch.Side(torch.zeros(2, 64), None)
    for arch in ("sm_80", "sm_86", "sm_90", "sm_100"):
        monkeypatch.setattr(tiles, "architecture", lambda _, arch=arch: arch)
        for kernel in ("statistics", "columns", "both", "coefficients", "exponentials", "gradient"):
            sizes = []
            for setting, dot in (("highest", "ieee"), ("high", "tf32")):
                precision(setting)
                tile = launch.tile_of(kernel, side, side)
                assert launch.pair_arguments(tile, side, side)["DOT"] == dot
                sizes.append(tile.block_m * tile.block_n)
            assert sizes[1] > sizes[0], (arch, kernel)


def test_unavailable_says_why(monkeypatch):
    from fused_infonce.backends.triton import launch

    assert "int64" in backend.unavailable(torch.zeros(1).long())
    assert "meta" in backend.unavailable(torch.zeros(1, device="meta"))
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert backend.unavailable(torch.zeros(1)) == ""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert "cpu" in backend.unavailable(torch.zeros(1))
