"""ImageNet's way into training, with 20,480 images: ``make imagenet-rehearsal``."""

from __future__ import annotations

import pytest
from imagenet_rehearsal import rehearse
from s3_server import moto_server

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(3600)]


def test_from_a_tar_of_tars_through_kills_and_a_bad_network_into_training(tmp_path, tiny_model_name, monkeypatch):
    with moto_server() as server:
        rehearse(
            tmp_path, server, tiny_model_name, monkeypatch, num_classes=100, num_images=20_480, samples_per_shard=64
        )
