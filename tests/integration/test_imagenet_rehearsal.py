"""ImageNet's way into training, small: the rehearsal that ``make imagenet-rehearsal`` runs at size."""

from __future__ import annotations

import pytest
from imagenet_rehearsal import rehearse
from s3_server import moto_server

pytestmark = pytest.mark.network


def test_from_a_tar_of_tars_through_kills_and_a_bad_network_into_training(tmp_path, tiny_model_name, monkeypatch):
    with moto_server() as server:
        rehearse(tmp_path, server, tiny_model_name, monkeypatch, num_classes=8, num_images=640, samples_per_shard=10)
