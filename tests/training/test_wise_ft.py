"""Weights between start and end: what they are, and that a linear head between the two answers by their mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medsd.errors import ConfigError
from medsd.networks.classifier import TileClassifier
from medsd.training.wise_ft import weight_space_ensemble


def test_at_both_ends_and_of_what_is_counted() -> None:
    start = {"weight": torch.randn(64) * 1e3, "count": torch.tensor(3)}
    trained = {"weight": torch.randn(64), "count": torch.tensor(7)}
    for alpha, end in ((0.0, start), (1.0, trained)):
        assert torch.equal(weight_space_ensemble(start, trained, alpha)["weight"], end["weight"])
    assert weight_space_ensemble(start, trained, 0.5)["count"] == 7


@given(st.floats(0, 1))
def test_a_head_between_two_answers_between_them(alpha: float) -> None:
    torch.manual_seed(0)
    network, x = TileClassifier("test_resnet").eval(), torch.rand(2, 3, 32, 32)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    torch.nn.init.normal_(network.head.weight)
    trained = {name: value.clone() for name, value in network.state_dict().items()}
    answers = []
    for state in (start, trained, weight_space_ensemble(start, trained, alpha)):
        network.load_state_dict(state)
        with torch.inference_mode():
            answers.append(network(x))
    torch.testing.assert_close(answers[2], (1 - alpha) * answers[0] + alpha * answers[1], atol=1e-4, rtol=1e-4)


def test_a_share_beyond_all_is_told() -> None:
    with pytest.raises(ConfigError, match="wise_ft_alpha"):
        weight_space_ensemble({}, {}, 1.5)
