"""Every name of the liger-kernel interface either resolves or says that it is not built yet."""

import importlib

import pytest

from liger_kernel._lazy import lazy_names

PACKAGES = ("ops", "transformers", "transformers.functional", "chunked_loss", "megatron")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_listed_name_resolves(package):
    module = importlib.import_module(f"liger_kernel.{package}")
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_a_name_still_to_come_says_so():
    _, resolve = lazy_names("liger_kernel.ops", {}, not_built=("LigerLaterFunction",))
    with pytest.raises(ImportError, match="LigerLaterFunction .* not built yet"):
        resolve("LigerLaterFunction")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_nobody_knows_is_an_attribute_error(package):
    module = importlib.import_module(f"liger_kernel.{package}")
    with pytest.raises(AttributeError, match="LigerNoSuchThing"):
        module.LigerNoSuchThing  # noqa: B018
