"""Which modules are treated, in networks of several makes."""

from __future__ import annotations

import pytest
import timm
from torch import nn

from medsd.errors import ConfigError, NetworkError
from medsd.saliency.smooth import Also, strided_points


def names(network: nn.Module, *also: Also) -> list[str]:
    return [point.name for point in strided_points(network, also)]


def test_of_a_resnet(small_resnet: nn.Module) -> None:
    assert names(small_resnet) == ["0", "3.conv1", "3.downsample"]
    assert names(small_resnet, "max_pool") == ["0", "2", "3.conv1", "3.downsample"]
    assert names(small_resnet, "average_pool", "patchify") == names(small_resnet)
    assert [point.stem for point in strided_points(small_resnet)] == [True, False, False]


def test_of_a_convnext() -> None:
    network = timm.create_model("test_convnext", num_classes=0)
    inner = [f"stages.{stage}.downsample.1" for stage in (1, 2, 3)]
    assert names(network) == inner
    assert names(network, "patchify") == ["stem.0", *inner]
    assert [point.stride for point in strided_points(network, ["patchify"])] == [(4, 4), *[(2, 2)] * 3]
    # The stem is what comes first, be it treated or not.
    assert [point.stem for point in strided_points(network)] == [False] * 3
    assert [point.stem for point in strided_points(network, ["patchify"])] == [True, False, False, False]


def test_strides_differ_by_axis_and_pooling_may_be_larger() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 1, 3, (1, 2)),
        nn.Conv2d(1, 1, 3, 1),
        nn.AvgPool2d(2),
        nn.MaxPool2d(3, (3, 1)),
        nn.AvgPool2d(3, 1),
        nn.Conv2d(1, 1, 4, (2, 4)),
    )
    strides = {point.name: point.stride for point in strided_points(network, ("average_pool", "max_pool", "patchify"))}
    assert strides == {"0": (1, 2), "2": (2, 2), "3": (3, 1), "5": (2, 4)}
    assert names(network) == ["0"]


def test_a_module_used_twice_is_one_point() -> None:
    shared = nn.Conv2d(2, 2, 3, 2)
    assert names(nn.Sequential(shared, nn.ReLU(), shared)) == ["0"]


def test_what_cannot_be_is_named(small_resnet: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"also='maxpool': use one of .*; did you mean 'max_pool'\?"):
        strided_points(small_resnet, ("maxpool",))  # type: ignore[arg-type]
    with pytest.raises(NetworkError, match="no convolution of stride 2, so there is nothing to smooth"):
        strided_points(nn.MaxPool2d(2))
    with pytest.raises(NetworkError, match="no convolution of stride 2 or pooling"):
        strided_points(nn.Conv2d(1, 1, 3, 4), ("max_pool",))
    with pytest.raises(NetworkError, match="no convolution of stride 2"):
        strided_points(nn.Conv3d(1, 1, 3, 2))
