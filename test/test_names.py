"""Every name of the liger-kernel interface resolves."""

import importlib

import pytest

PACKAGES = ("ops", "transformers", "transformers.functional", "chunked_loss", "megatron")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_listed_name_resolves(package):
    module = importlib.import_module(f"liger_kernel.{package}")
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_nobody_knows_is_an_attribute_error(package):
    module = importlib.import_module(f"liger_kernel.{package}")
    with pytest.raises(AttributeError, match="LigerNoSuchThing"):
        module.LigerNoSuchThing  # noqa: B018
