"""A model's configuration as plain data: what a compile request carries."""

import json

import pytest

from redco_like.models import ModelConfig, architecture, architectures


@pytest.mark.parametrize("name", architectures())
def test_a_configuration_survives_json(name):
    config = architecture(name)
    assert ModelConfig.from_record(json.loads(json.dumps(config.to_record()))) == config


def test_an_unknown_or_missing_field_is_named():
    record = architecture("llama-3-8b").to_record()
    with pytest.raises(ValueError, match=r"unknown \['widht'\] and lacks \['embed'\]"):
        ModelConfig.from_record({"widht" if name == "embed" else name: value for name, value in record.items()})
    mixture = architecture("mixtral-8x7b").to_record()
    mixture["experts"].pop("count")
    with pytest.raises(ValueError, match=r"experts .*lacks \['count'\]"):
        ModelConfig.from_record(mixture)
