"""Tokens of vision transformers on their grid, and what encoders of tile classifiers may be made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.models import VisionTransformer

from medsd.errors import ConfigError, NetworkError, WeightsError
from medsd.heatmap.engine import make_engine
from medsd.heatmap.maps import MapSettings
from medsd.networks.classifier import TileClassifier, create_encoder
from medsd.networks.effective_field import measure_effective_field
from medsd.networks.modes import recorded
from medsd.networks.start import load_encoder, open_encoder, save_encoder
from medsd.networks.tokens import TokenGrid, token_grid
from medsd.networks.weights import ModelCard, load_classifier, save_classifier
from medsd.saliency.neutral import NeutralReference
from medsd.slides.tissue import TissueMask

SMALL = {"img_size": 64, "depth": 2}


def transformer(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=2, **{"depth": 2, **options}).eval()


@pytest.mark.parametrize(
    ("options", "prefix"),
    [({}, 1), ({"reg_tokens": 4}, 5), ({"class_token": False, "global_pool": "avg"}, 0)],
)
def test_patches_of_an_oblong_image_row_by_row(options: Mapping[str, Any], prefix: int) -> None:
    network, tokens = transformer(img_size=(48, 80), **options), []
    images = torch.randn(2, 3, 48, 80)
    network.blocks[0].register_forward_hook(lambda _m, _i, output: tokens.append(output))
    with torch.no_grad(), recorded(network, "blocks.0") as outputs:
        network(images)
    assert token_grid(network, "blocks.0", images) == TokenGrid(prefix, 3, 5)
    assert outputs[0].shape == (2, 64, 3, 5)
    for row in range(3):
        for column in range(5):
            assert torch.equal(outputs[0][:, :, row, column], tokens[0][:, prefix + 5 * row + column])
    moved = TokenGrid(prefix, 3, 5).with_map(tokens[0], outputs[0].repeat(2, 1, 1, 1) + 1)
    assert torch.equal(
        moved, torch.cat([tokens[0][:, :prefix].repeat(2, 1, 1), tokens[0][:, prefix:].repeat(2, 1, 1) + 1], 1)
    )


def test_torchvisions_transformer_and_what_is_none() -> None:
    network, images = VisionTransformer(32, 8, 1, 2, 16, 16, num_classes=2), torch.zeros(1, 3, 32, 32)
    assert token_grid(network, "encoder.layers.encoder_layer_0", images) == TokenGrid(1, 4, 4)
    assert token_grid(timm.create_model("test_resnet"), "layer1", images) is None
    with pytest.raises(NetworkError, match=r"'blocks.0': its 7 tokens are not 1 and a grid of 2 x 2"):
        TokenGrid(1, 2, 2).map_of("blocks.0", torch.zeros(1, 7, 8))


def test_a_classifier_is_its_head_on_the_mean_of_the_patches() -> None:
    torch.manual_seed(0)
    classifier = TileClassifier("test_vit", encoder_options=SMALL).eval()
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        tokens = classifier.encoder.forward_features(classifier.normalise(images))
        torch.testing.assert_close(classifier(images), classifier.head(tokens[:, 1:].mean(dim=1)))
        assert classifier.feature_map(images).shape == (2, classifier.feature_dim, 4, 4)
    fixed = TileClassifier("test_vit", encoder_options={**SMALL, "dynamic_img_size": False})
    with pytest.raises(NetworkError, match=r"Input height \(96\) doesn't match"):
        fixed(torch.zeros(1, 3, 96, 96))
    field = measure_effective_field(classifier, "blocks.1")
    assert (field.stride, field.centre) == (16, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpoint_path": "x.pt"}, "use one of end, img_size"),
        ({"img_size": "64"}, "img_size='64': must be a whole number"),
        ({"class_token": 1}, "class_token=1: must be true or false"),
        ({"mlp_layer": "Sequential"}, "mlp_layer='Sequential': use one of Mlp"),
    ],
)
def test_only_plain_options_reach_timm(options: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        TileClassifier("test_vit", encoder_options=options)
    assert "\n" not in str(caught.value)


def test_options_of_a_convolutional_encoder() -> None:
    with pytest.raises(ConfigError, match=r"encoder_options.*leave them out"):
        TileClassifier("test_resnet", encoder_options={"img_size": 64})


@pytest.mark.parametrize("layers", ["SwiGLUPacked", "Mlp"])
def test_the_layers_that_weights_of_others_were_made_with(layers: str) -> None:
    options = {**SMALL, "mlp_layer": layers, "act_layer": "silu", "init_values": 1e-5, "reg_tokens": 2}
    assert TileClassifier("test_vit", encoder_options=options).feature_dim == 64


@pytest.mark.parametrize(
    ("options", "tile_px", "words"),
    [
        (
            {**SMALL, "dynamic_img_size": False},
            96,
            "tile_px=96: encoder 'test_vit' takes images of 64 px; set tile_px to 64",
        ),
        ({**SMALL, "dynamic_img_size": True}, 40, "tile_px=40: must be a multiple of the patches"),
        ({**SMALL, "dynamic_img_size": True}, 96, ""),
    ],
)
def test_tiles_of_the_transformers_size(options: Mapping[str, Any], tile_px: int, words: str) -> None:
    classifier, settings = (
        TileClassifier("test_vit", encoder_options=options),
        MapSettings(layer="norm", smoothing="none"),
    )
    if not words:
        assert make_engine(classifier, tile_px, 1.0, settings=settings).strides == (16, 16)
        return
    with pytest.raises(NetworkError, match=words) as caught:
        make_engine(classifier, tile_px, 1.0, settings=settings)
    assert "\n" not in str(caught.value)


def test_no_dense_map_of_tokens() -> None:
    classifier = TileClassifier("test_vit", encoder_options=SMALL)
    with pytest.raises(NetworkError, match="every token sees the whole image"):
        make_engine(classifier, 64, 1.0, settings=MapSettings(layer="norm", smoothing="none", way="dense"))


def test_weights_keep_what_the_transformer_was_made_with(tmp_path: Path) -> None:
    classifier = TileClassifier("test_vit", encoder_options=SMALL).eval()
    card = ModelCard("test_vit", classifier.classes, 64, 1.0, "noise", options=classifier.options)
    save_classifier(tmp_path / "model.safetensors", classifier, card)
    loaded, _, _ = load_classifier(tmp_path / "model.safetensors")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), classifier(images))
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, classifier.encoder, "test_vit", "noise", options=SMALL)
    found = open_encoder(path)
    assert found is not None
    with torch.no_grad():
        assert torch.equal(found.network(images), classifier.encoder(images))


def test_weights_that_would_have_timm_open_a_file(tmp_path: Path) -> None:
    """A card is data: what it says reaches timm through the same list as a user's options."""
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, timm.create_model("test_vit", num_classes=0), "test_vit", "noise")
    with pytest.raises(ConfigError, match="checkpoint_path"):
        create_encoder("test_vit", False, options={"checkpoint_path": str(path)})
    assert json.dumps(dict(SMALL))  # plain values alone go into a card


def test_timms_own_files_with_a_head_and_a_norm_behind_the_pooling(tmp_path: Path) -> None:
    pooled = transformer(img_size=64, class_token=False, global_pool="avg", no_embed_class=True)
    state = pooled.state_dict()
    assert {"fc_norm.weight", "head.weight"} <= state.keys()
    save_file(state, tmp_path / "timm.safetensors")
    encoder, _ = create_encoder("test_vit", False, options={**SMALL, "class_token": False, "no_embed_class": True})
    load_encoder(encoder, tmp_path / "timm.safetensors")
    torch.testing.assert_close(encoder.norm.weight, pooled.fc_norm.weight)
    other, _ = create_encoder("test_vit", False, options={**SMALL, "depth": 1})
    with pytest.raises(WeightsError, match="tensors of another encoder"):
        load_encoder(other, tmp_path / "timm.safetensors")


def test_tiles_of_a_slide_add_up_and_say_by_what_correction(array_slide: Any) -> None:
    """At the last norm nothing is missing; below a block whose class token matters something is, and is told."""
    torch.manual_seed(0)
    classifier = TileClassifier("test_vit", encoder_options=SMALL).eval()
    for parameter in classifier.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.15)
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    slide, tissue = array_slide(pixels), TissueMask(np.ones((8, 8), bool), 16.0)
    moved = {}
    for layer in ("norm", "blocks.0"):
        reference = NeutralReference(layer, (0.1,) * 64, 0.0, 0.5, "tile", "")
        engine = make_engine(
            classifier, 64, 1.0, settings=MapSettings(layer=layer, smoothing="none"), reference=reference
        )
        if layer == "norm":  # a reference of evidence 0 there, and as it comes in the block
            against, for_it = classifier.head.weight.detach().double()
            bias = classifier.head.bias.detach().double()
            vector = (bias[0] - bias[1]) * (for_it - against) / (for_it - against).square().sum()
            engine.reference = replace(reference, vector=tuple(vector.tolist()))
        images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
        _, maps = engine.run(images)
        with torch.no_grad():
            logits = classifier(images)
        np.testing.assert_allclose(maps.sum(axis=(1, 2)), (logits[:, 1] - logits[:, 0]).numpy(), rtol=1e-3, atol=1e-4)
        moved[layer] = engine.map(slide, tissue).moved
    assert moved["norm"] is not None and moved["norm"] < 1e-4
    assert moved["blocks.0"] is not None and moved["blocks.0"] > 1e-2
